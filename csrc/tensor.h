// Thin helpers over torch::stable::Tensor: allocation (with poisoning for tests), layout, dtype names, argument errors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tokenprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// Memory that could not be had. The registration of an op (op.h) catches it and adds the op's name.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Fresh output or workspace on the device of `like`. TOKENPRUNE_POISON=1 fills it with NaN or a poison integer, which
// shows elements that a kernel forgot to write.
Tensor new_empty(const Tensor& like, const Shape& shape, ScalarType dtype);
// The same in the dtype of `like`, whichever it is: also one that this build's ScalarType does not know.
Tensor new_empty_of_same_dtype(const Tensor& like, const Shape& shape);

// How bytes are set in the memory of a CUDA tensor, on its current stream: the CUDA bindings fill this in, so that a
// build without them needs no CUDA library.
extern void (*fill_cuda_bytes)(const Tensor& t, int byte);
// The version of the CUDA runtime in this library (13000 for 13.0), which they fill in too; 0 without one.
extern int cuda_runtime_version;

// `t` itself when its last dimension has stride 1 (or at most one element), a contiguous copy otherwise.
Tensor with_contiguous_rows(const Tensor& t);
OptionalTensor with_contiguous_rows(const OptionalTensor& t);

// A contiguous copy in another dtype, or `t` itself when nothing has to change.
Tensor contiguous_as(const Tensor& t, ScalarType dtype);

// The bytes of a bool tensor. A view of other data as bool may hold any of the 256 values, and all but 0 mean True;
// loaded as C++ bool, a value other than 0 and 1 would be undefined behaviour.
inline const uint8_t* mask_bytes(const Tensor& mask) { return static_cast<const uint8_t*>(mask.const_data_ptr()); }
inline const uint8_t* mask_bytes(const OptionalTensor& mask) { return mask ? mask_bytes(*mask) : nullptr; }

inline bool is_float64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
// float64 inputs are computed and returned in float64, all others in float32.
inline ScalarType wide_type(const Tensor& t) { return is_float64(t) ? ScalarType::Double : ScalarType::Float; }

std::string dtype_name(ScalarType dtype);
std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes);
std::string shape_text(const Tensor& t);
std::string device_text(const Tensor& t);

template <class Got>
[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected, const Got& got,
                       const std::string& instead = "") {
  std::ostringstream text;
  text << "tokenprune::" << op << ": " << argument << " must " << expected << ", got " << got;
  if (!instead.empty()) text << "; " << instead;  // what to type
  throw std::runtime_error(text.str());
}

}  // namespace tokenprune
