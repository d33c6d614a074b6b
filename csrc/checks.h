// The checks that generated/ops.h is made of. They mirror tokenprune_kernels/_checks.py, with the same sentences.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace tokenprune {

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// Stride 0 makes dimensions of any size, which no loop gets through and whose products overflow. No argument may have
// more elements than this, which is beyond every memory, and no call needs that many multiplications.
constexpr int kElementBits = 40, kWorkBits = 56;

// Is the product of the sizes below 2^bits? A size of 0 counts as 1: it ends no loop over the other dimensions.
template <class Sizes>
bool product_is_below(int bits, const Sizes& sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (size > 0 && __builtin_mul_overflow(product, size, &product)) return false;
  return product < int64_t(1) << bits;
}

// `product` says which sizes are multiplied, as "B * N * C".
inline void check_work(const char* op, const char* name, const char* product, std::initializer_list<int64_t> sizes) {
  if (product_is_below(kWorkBits, sizes)) return;
  fail(op, name, std::string("keep ") + product + " below 2^" + std::to_string(kWorkBits), shape_text(sizes));
}

// Every tensor of every op passes here, before any loop and any allocation.
inline void check_size(const char* op, const char* name, const Tensor& t) {
  if (product_is_below(kElementBits, t.sizes())) return;
  fail(op, name, "have fewer than 2^" + std::to_string(kElementBits) + " elements (a size of 0 counts as 1)",
       shape_text(t));
}

// A tensor of zeros that forward-mode differentiation makes has none. The dispatcher replaces it on the way here,
// unless the caller has turned that off.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() > 0 && t.const_data_ptr() == nullptr) fail(op, name, "have memory", "a tensor without");
}

// Python's None for a required tensor arrives as an undefined one.
inline void check_defined(const char* op, const char* name, const Tensor& t) {
  if (!t.defined()) fail(op, name, "be a tensor", "None");
}

// What to type instead of a wrong tensor, in the words of tokenprune_kernels/_advice.py.
constexpr const char* kMaskOfTokens =
    "pass the mask of the tokens alone, as attention_mask.bool() is before a model makes four dimensions of it, and "
    "causal=True for the rest";

// `wanted`: none for any floating one.
inline std::string instead_of_dtype(const std::string& name, std::optional<ScalarType> wanted, const Tensor& t) {
  const ScalarType got = t.scalar_type();
  const bool integer = got == ScalarType::Long || got == ScalarType::Int || got == ScalarType::Short ||
                       got == ScalarType::Char || got == ScalarType::Byte;
  const bool number = is_floating(got), flag = got == ScalarType::Bool;
  if (!wanted) return integer || flag ? "type " + name + ".float()" : "";
  if (*wanted == ScalarType::Bool) {
    if (number && t.dim() == 4) return kMaskOfTokens;
    if (integer) return "type " + name + ".bool()";
    return number ? "type " + name + " > 0, or " + name + " == 0 where -inf hides" : "";
  }
  if (flag) return "type mask_to_indices(" + name + ")[0] for the indices of True";
  return integer || number ? "type " + name + ".long()" : "";
}

// `sizes`: those wanted, -1 for any; `first`: no tensor before this one has said how many samples there are.
template <class Sizes>
std::string instead_of_shape(const std::string& name, const Sizes& sizes, const Tensor& t, bool first) {
  const int64_t rank = sizes.size(), batch = rank > 0 ? *sizes.begin() : 0;
  if (rank == 2 && t.dim() == 4 && t.scalar_type() == ScalarType::Bool) return kMaskOfTokens;
  if (t.dim() != rank - 1) return "";
  if (rank == 4)
    return "type " + name + ".unflatten(-1, (heads, -1)).transpose(1, 2) to split heads, or " + name +
           ".unsqueeze(0) for a batch of one";
  if (first || batch == 1) return "type " + name + ".unsqueeze(0) for a batch of one";
  std::string same;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t want = sizes.begin()[d + 1];
    if (want != -1 && want != t.size(d)) return "";
    same += ", -1";
  }
  return "type " + name + ".expand(" + std::to_string(batch) + same + ") to share it";
}

// A required floating-point tensor of the given rank; `layout` is its shape in words, as [B, N, C].
inline void check_floating(const char* op, const char* name, const Tensor& t, const char* layout, int64_t rank) {
  check_defined(op, name, t);
  if (!is_floating(t.scalar_type()))
    fail(op, name, "be float16, bfloat16, float32 or float64", dtype_name(t.scalar_type()),
         instead_of_dtype(name, std::nullopt, t));
  if (t.dim() != rank)
    fail(op, name, std::string("have shape ") + layout, shape_text(t),
         instead_of_shape(name, Shape(rank, -1), t, true));
  check_size(op, name, t);
  check_memory(op, name, t);
}

// A tensor on the device of `first`; -1 in `shape` leaves that size free; no dtype means any floating one, or with
// `like`, which is the name of `first`, the dtype of that.
inline void check_beside(const char* op, const char* name, const Tensor& t, const Tensor& first, const char* layout,
                         std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype,
                         const char* like = nullptr) {
  check_defined(op, name, t);
  const ScalarType got = t.scalar_type();
  if (dtype ? got != *dtype : !is_floating(got))
    fail(op, name, "be " + (dtype ? dtype_name(*dtype) : "float16, bfloat16, float32 or float64"), dtype_name(got),
         instead_of_dtype(name, dtype, t));
  if (like != nullptr && got != first.scalar_type())
    fail(op, name, std::string("have the dtype of ") + like + " (" + dtype_name(first.scalar_type()) + ")",
         dtype_name(got), std::string("type ") + name + ".to(" + like + ".dtype)");
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t want : shape) {
    fits = fits && (want == -1 || want == t.size(d));
    ++d;
  }
  if (!fits) {
    std::ostringstream text;
    text << "have shape " << layout;
    const char* before = " = [";
    if (&t != &first) {
      for (int64_t want : shape) {
        text << before;
        want == -1 ? text << "any" : text << want;
        before = ", ";
      }
      text << "]";
    }
    fail(op, name, text.str(), shape_text(t), instead_of_shape(name, shape, t, &t == &first));
  }
  check_size(op, name, t);
  if (device_text(t) != device_text(first))
    fail(op, name, "be on " + device_text(first), device_text(t),
         std::string("type ") + name + ".to('" + device_text(first) + "')");
  check_memory(op, name, t);
}

inline void check_beside(const char* op, const char* name, const OptionalTensor& t, const Tensor& first,
                         const char* layout, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype) {
  if (t) check_beside(op, name, *t, first, layout, shape, dtype);
}

// How many entries to return for each of `batch` samples.
inline void check_count(const char* op, const char* name, int64_t k, int64_t batch) {
  if (k < 0) fail(op, name, "be non-negative", k);
  if (!product_is_below(kElementBits, std::initializer_list<int64_t>{batch, k}))
    fail(op, name, "keep B * " + std::string(name) + " below 2^" + std::to_string(kElementBits),
         shape_text({batch, k}));
}

inline void check_at_least(const char* op, const char* name, int64_t value, int64_t low) {
  if (value < low) fail(op, name, "be >= " + std::to_string(low), value);
}

inline void check_real(const char* op, const char* name, double value, double low, bool above = false,
                       double high = std::numeric_limits<double>::infinity()) {
  if ((above ? value > low : value >= low) && value <= high) return;  // NaN fails both
  std::ostringstream text;
  text << "be " << (above ? "> " : ">= ") << low << " and <= " << high;
  fail(op, name, text.str(), value);
}

// The index of `value` among the words, or -1.
inline int index_of_word(std::string_view value, std::initializer_list<const char*> words) {
  int index = 0;
  for (const char* word : words) {
    if (value == word) return index;
    ++index;
  }
  return -1;
}

inline std::string one_of(std::initializer_list<const char*> words) {
  std::string list;
  for (const char* word : words) list += (list.empty() ? "be one of " : ", ") + std::string(word);
  return list;
}

inline int check_choice(const char* op, const char* name, std::string_view value,
                        std::initializer_list<const char*> words) {
  const int index = index_of_word(value, words);
  if (index < 0) fail(op, name, one_of(words), "'" + std::string(value) + "'");
  return index;
}

// Of several words joined by "+", in the order asked for; or of `alone`, a word behind them that joins no other.
inline std::vector<int> check_choices(const char* op, const char* name, std::string_view value,
                                      std::initializer_list<const char*> words, const char* alone = nullptr) {
  if (alone != nullptr && value == alone) return {static_cast<int>(words.size())};
  std::vector<int> indices;
  for (size_t begin = 0; begin <= value.size();) {
    const size_t end = std::min(value.find('+', begin), value.size());
    indices.push_back(index_of_word(value.substr(begin, end - begin), words));
    if (indices.back() < 0) {
      const std::string or_alone = alone != nullptr ? std::string(", or ") + alone + " alone" : "";
      fail(op, name, one_of(words) + ", or several joined by +" + or_alone, "'" + std::string(value) + "'");
    }
    begin = end + 1;
  }
  return indices;
}

// Contract: index values outside [-1, size) raise IndexError (std::out_of_range becomes one in Python).
inline void check_index_values(const char* op, const char* name, const int64_t* values, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= -1 && values[i] < size) continue;
    std::ostringstream text;
    text << "tokenprune::" << op << ": " << name << " must lie in [-1, " << size << "), got " << values[i];
    throw std::out_of_range(text.str());
  }
}

// All values of an index tensor [B, V] in CPU memory whose last dimension is contiguous.
inline void check_index_values(const char* op, const char* name, const Tensor& indices, int64_t size) {
  const int64_t batch = indices.size(1) > 0 ? indices.size(0) : 0;
  for (int64_t b = 0; b < batch; ++b)
    check_index_values(op, name, indices.const_data_ptr<int64_t>() + b * indices.stride(0), indices.size(1), size);
}

}  // namespace tokenprune
