// CPU kernels of the selection ops.

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "cpu/selection_choose.h"
#include "dispatch.h"
#include "op.h"
#include "tokenprune/math.h"

namespace tokenprune {

namespace {

struct Selected {
  Selected(const Tensor& like, int64_t batch, int64_t k)
      : indices(new_empty(like, {batch, k}, ScalarType::Long)),
        counts(new_empty(like, {batch}, ScalarType::Long)),
        capacity(k),
        index(indices.mutable_data_ptr<int64_t>()),
        count(counts.mutable_data_ptr<int64_t>()) {}

  void list(int64_t sample, const uint8_t* marked, int64_t n) const {
    count[sample] = list_ascending(marked, n, capacity, index + sample * capacity);
  }
  std::tuple<Tensor, Tensor> result() const { return {indices, counts}; }

  Tensor indices, counts;
  int64_t capacity;
  int64_t *index, *count;
};

// keys[i] of the tokens that `mask` allows, in the order of values or, with `largest` false, in the reversed one.
template <class T, class Key>
void order_keys(const T* scores, const uint8_t* mask, int64_t n, bool largest, Key* keys) {
  if (mask == nullptr && largest) {
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(to_float(scores[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const Key key = order_key(to_float(scores[i]), mask == nullptr || mask[i]);
    keys[i] = largest ? key : reversed_key<Wide<T>>(key);
  }
}

std::tuple<Tensor, Tensor> mask_to_indices(const Tensor& mask_in, int64_t capacity) {
  check_mask_to_indices(mask_in, capacity);
  const Tensor mask = with_contiguous_rows(mask_in);
  const int64_t batch = mask.size(0), n = mask.size(1), stride = mask.stride(0);
  const Selected selected(mask, batch, capacity);
  const uint8_t* flags = mask_bytes(mask);
  parallel_for(batch, 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) selected.list(b, flags + b * stride, n);
  });
  return selected.result();
}

// The values of an int64 vector, clamped to [0, most]; `absent` for all samples where there is none.
struct Clamped {
  Clamped(const Tensor* t, int64_t most, int64_t absent)
      : values(t != nullptr ? t->const_data_ptr<int64_t>() : nullptr),
        stride(t != nullptr ? t->stride(0) : 0),
        most(most),
        absent(absent) {}
  int64_t operator[](int64_t b) const {
    return values != nullptr ? std::clamp<int64_t>(values[b * stride], 0, most) : absent;
  }

  const int64_t* values;
  int64_t stride, most, absent;
};

// Of each sample its budget of tokens, k without `budgets`; `num_low` of them from the low end, none without.
template <class T>
void select_tails(const Tensor& scores, const MaskRows& mask, const Tensor* num_low, const Tensor* budgets,
                  bool largest, const Selected& selected) {
  using Key = decltype(order_key(Wide<T>{}));
  const int64_t n = scores.size(1), stride = scores.stride(0), k = selected.capacity;
  const T* values = static_cast<const T*>(scores.const_data_ptr());
  const Clamped low(num_low, k, 0), budget(budgets, k, k);
  over_samples<Workspace<Key>>(scores.size(0), n, [&](int64_t b, Workspace<Key>& space) {
    Key* keys = space.keys.get();
    uint8_t* chosen = space.chosen.get();
    const T* row = values + b * stride;
    const int64_t tail = low[b];
    std::fill(chosen, chosen + n, uint8_t(0));
    order_keys(row, mask.row(b), n, largest, keys);
    choose_best(keys, n, budget[b] - tail, space.scratch.get(), chosen);
    if (tail > 0) {
      for (int64_t i = 0; i < n; ++i) keys[i] = chosen[i] ? kNoKey : reversed_key<Wide<T>>(keys[i]);
      choose_best(keys, n, tail, space.scratch.get(), chosen);
    }
    selected.list(b, chosen, n);
  });
}

std::tuple<Tensor, Tensor> select(const Tensor& scores_in, const OptionalTensor& mask, const Tensor* num_low,
                                  const Tensor* budgets, int64_t k, bool largest) {
  const Tensor scores = with_contiguous_rows(scores_in);
  const Selected selected(scores, scores.size(0), k);
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    select_tails<typename decltype(tag)::type>(scores, MaskRows(mask), num_low, budgets, largest, selected);
  });
  return selected.result();
}

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, int64_t k, const OptionalTensor& mask, bool largest,
                                       const OptionalTensor& budgets) {
  check_select_topk(scores, k, mask, largest, budgets);
  return select(scores, mask, nullptr, budgets ? &*budgets : nullptr, k, largest);
}

std::tuple<Tensor, Tensor> select_two_tailed(const Tensor& scores, const Tensor& num_low, int64_t k,
                                             const OptionalTensor& mask) {
  check_select_two_tailed(scores, num_low, k, mask);
  return select(scores, mask, &num_low, nullptr, k, true);
}

// The tokens of one sample sorted by group.
template <class Key>
struct GroupWorkspace : Workspace<Key> {
  GroupWorkspace(int64_t n, int64_t groups)
      : Workspace<Key>(n), token(new int64_t[n]), listed(new uint8_t[n]), begin(new int64_t[groups + 1]) {}
  std::unique_ptr<int64_t[]> token;
  std::unique_ptr<uint8_t[]> listed;  // is token[slot] chosen?
  std::unique_ptr<int64_t[]> begin;   // the first slot of each group
};

// A counting sort by group, which leaves the tokens of a group in ascending order, and a selection of its own in each.
// `group_of` and `budget` of one sample have rows of stride 1.
template <class T, class Key>
void choose_in_groups(const T* scores, const int64_t* group_of, const int64_t* budget, const uint8_t* mask, int64_t n,
                      int64_t groups, bool largest, GroupWorkspace<Key>& space) {
  const auto taking_part = [&](int64_t i) {
    const int64_t g = group_of[i];
    return g >= 0 && g < groups && budget[g] > 0 && (mask == nullptr || mask[i]);
  };
  int64_t* const begin = space.begin.get();
  std::fill(begin, begin + groups + 1, int64_t(0));
  for (int64_t i = 0; i < n; ++i)
    if (taking_part(i)) ++begin[group_of[i]];
  int64_t slots = 0;
  for (int64_t g = 0; g <= groups; ++g) slots += std::exchange(begin[g], slots);
  for (int64_t i = 0; i < n; ++i) {
    if (!taking_part(i)) continue;
    const int64_t slot = begin[group_of[i]]++;  // what was the group's first slot is the next group's, in the end
    const Key key = order_key(to_float(scores[i]));
    space.keys[slot] = largest ? key : reversed_key<Wide<T>>(key);
    space.token[slot] = i;
  }
  uint8_t *const listed = space.listed.get(), *const chosen = space.chosen.get();
  std::fill(listed, listed + n, uint8_t(0));
  std::fill(chosen, chosen + n, uint8_t(0));
  for (int64_t g = 0, first = 0; g < groups; first = begin[g++])
    choose_best(space.keys.get() + first, begin[g] - first, budget[g], space.scratch.get(), listed + first);
  for (int64_t slot = 0; slot < slots; ++slot) chosen[space.token[slot]] = listed[slot];
}

std::tuple<Tensor, Tensor> select_grouped_topk(const Tensor& scores_in, const Tensor& groups_in,
                                               const Tensor& budgets_in, int64_t k, const OptionalTensor& mask_in,
                                               bool largest) {
  check_select_grouped_topk(scores_in, groups_in, budgets_in, k, mask_in, largest);
  const Tensor scores = with_contiguous_rows(scores_in), groups = with_contiguous_rows(groups_in);
  const Tensor budgets = with_contiguous_rows(budgets_in);
  const int64_t n = scores.size(1);
  const Selected selected(scores, scores.size(0), k);
  const MaskRows mask(mask_in);
  const int64_t* const group_of = groups.const_data_ptr<int64_t>();
  const int64_t* const budget = budgets.const_data_ptr<int64_t>();
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Space = GroupWorkspace<decltype(order_key(Wide<T>{}))>;
    const T* const values = static_cast<const T*>(scores.const_data_ptr());
    over_samples<Space>(
        scores.size(0), n,
        [&](int64_t b, Space& space) {
          choose_in_groups(values + b * scores.stride(0), group_of + b * groups.stride(0),
                           budget + b * budgets.stride(0), mask.row(b), n, budgets.size(1), largest, space);
          selected.list(b, space.chosen.get(), n);
        },
        budgets.size(1));
  });
  return selected.result();
}

// f(0) + ... + f(n - 1) in float64, in blocks: rounding errors grow with the length of a block, not with n.
template <class F>
double blocked_sum(int64_t n, const F& f) {
  constexpr int64_t kBlock = 128;
  double sum = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    double part = 0;
    for (int64_t i = start; i < std::min(n, start + kBlock); ++i) part += f(i);
    sum += part;
  }
  return sum;
}

// Logarithms in the arithmetic type, sums in float64.
template <class T>
Wide<T> entropy(const T* scores, const uint8_t* mask, int64_t n, bool normalized) {
  using A = Wide<T>;
  const auto mass = [&](int64_t i) {
    const A value = to_float(scores[i]);
    return value > 0 && (mask == nullptr || mask[i]) ? value : A(0);  // NaN counts as 0
  };
  int64_t tokens = n;
  if (mask != nullptr) tokens = std::count_if(mask, mask + n, [](uint8_t m) { return m != 0; });
  if (tokens <= 1) return 0;
  const double total = blocked_sum(n, mass);
  if (total == 0) return normalized ? A(1) : A(std::log(double(tokens)));
  double sum = blocked_sum(n, [&](int64_t i) { return entropy_term(static_cast<A>(mass(i) / total)); });
  if (normalized) {
    sum /= std::log(double(tokens));
    sum = sum < 0 ? 0 : (sum > 1 ? 1 : sum);
  }
  return static_cast<A>(sum);
}

Tensor score_entropy(const Tensor& scores_in, const OptionalTensor& mask_in, bool normalized) {
  check_score_entropy(scores_in, mask_in, normalized);
  const Tensor scores = with_contiguous_rows(scores_in);
  const int64_t batch = scores.size(0), n = scores.size(1), stride = scores.stride(0);
  const MaskRows mask(mask_in);
  Tensor result = new_empty(scores, {batch}, wide_type(scores));
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* values = static_cast<const T*>(scores.const_data_ptr());
    auto* out = static_cast<Wide<T>*>(result.mutable_data_ptr());
    parallel_for(batch, 1 + 4096 / (n + 1), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) out[b] = entropy(values + b * stride, mask.row(b), n, normalized);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  TOKENPRUNE_IMPL(m, "select_topk", select_topk);
  TOKENPRUNE_IMPL(m, "select_grouped_topk", select_grouped_topk);
  TOKENPRUNE_IMPL(m, "select_two_tailed", select_two_tailed);
  TOKENPRUNE_IMPL(m, "mask_to_indices", mask_to_indices);
  TOKENPRUNE_IMPL(m, "score_entropy", score_entropy);
}

}  // namespace tokenprune
