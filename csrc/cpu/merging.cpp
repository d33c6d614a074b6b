// CPU kernel of merge_tokens: which target every token resembles most, then the mean of those that joined each target.
//
// The first part multiplies tiles of tokens with panels of targets and keeps only the best of each tile; keys are read
// in their own dtype, and a cosine is a product with a unit row, divided by the key's norm in the end. The second part
// sums in ascending token order, with columns shared out among the threads.

#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/selection_choose.h"
#include "cpu/simd/merging.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/similarity.h"
#include "cpu/unit_rows.h"
#include "dispatch.h"
#include "op.h"
#include "parallel.h"
#include "tokenprune/math.h"

namespace tokenprune {

namespace {

constexpr int64_t kTile = 48;       // tokens that are compared with a panel together
constexpr int64_t kColumns = 1024;  // columns of values that are summed together

struct Likeness {
  bool euclidean, include_targets;
  std::optional<double> threshold;
};

// The rows of the targets that there are, in panels. Sample b's are panels first[b] .. first[b + 1], whose lanes
// belong to slot[first[b] * lanes], ...: ascending, with the last one repeated up to a full panel, which wins no tie.
struct TargetPanels {
  std::vector<int64_t> slot, first = {0};
  Tensor rows;
};

template <class T>
TargetPanels pack_targets(const Tensor& keys, const Tensor& targets, bool euclidean) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = keys.size(2);
  TargetPanels panels;
  std::vector<const T*> rows;
  for (int64_t b = 0; b < targets.size(0); ++b) {
    const int64_t* target = targets.const_data_ptr<int64_t>() + b * targets.stride(0);
    const T* sample = static_cast<const T*>(keys.const_data_ptr()) + b * keys.stride(0);
    for (int64_t c = 0; c < targets.size(1); ++c) {
      if (target[c] < 0) continue;
      panels.slot.push_back(c);
      rows.push_back(sample + target[c] * keys.stride(1));
    }
    while (rows.size() % lanes) {
      panels.slot.push_back(panels.slot.back());
      rows.push_back(rows.back());
    }
    panels.first.push_back(static_cast<int64_t>(rows.size()) / lanes);
  }
  const int64_t packed = rows.size();
  panels.rows = new_empty(keys, {packed, dim}, wide_type(keys));
  A* const out = static_cast<A*>(panels.rows.mutable_data_ptr());
  parallel_for(packed / lanes, 1 + 1024 / (dim + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> wide(lanes * dim);
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t l = 0; l < lanes; ++l) {
        A* const row = wide.data() + l * dim;
        if (euclidean)
          similarity_kernels<T>().widen(rows[p * lanes + l], dim, row);
        else
          normalize_row(kernels, rows[p * lanes + l], dim, row);
      }
      kernels.pack_panel(wide.data(), dim, lanes, dim, out + p * lanes * dim);
    }
  });
  return panels;
}

// joined[b, i]: the slot of the target that token i resembles most, or -1. Of the targets themselves, too.
template <class T>
void join_nearest(const Tensor& keys, const Tensor& targets, const MaskRows& mask, const Likeness& likeness,
                  int64_t* joined) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const auto& merging = merging_kernels<A>();
  const TargetPanels panels = pack_targets<T>(keys, targets, likeness.euclidean);
  const A* const packed = static_cast<const A*>(panels.rows.const_data_ptr());
  const int64_t batch = keys.size(0), n = keys.size(1), dim = keys.size(2), lanes = kernels.panel_lanes;
  const int64_t tiles = (n + kTile - 1) / kTile;
  const auto compare = likeness.euclidean ? kernels.panel_distances : kernels.panel_dots;
  const A sign = likeness.euclidean ? -1 : 1, infinity = std::numeric_limits<A>::infinity();
  const A limit = likeness.threshold ? sign * static_cast<A>(*likeness.threshold) : -infinity;
  const int64_t work = kTile * lanes * (dim + 1) * (1 + panels.first[batch] / (batch + 1));
  parallel_for(batch * tiles, 1 + 65536 / work, [&](int64_t begin, int64_t end) {
    std::vector<A> dots(kTile * lanes), unit(dim), wide(std::is_same_v<T, A> ? 0 : kTile * unit_stride(dim));
    A best[kTile];
    int64_t at[kTile];
    const auto nearest = [&](int64_t b, const A* x, int64_t stride, int64_t count, A* best, int64_t* at) {
      std::fill(best, best + count, -infinity);
      std::fill(at, at + count, int64_t(-1));
      for (int64_t p = panels.first[b]; p < panels.first[b + 1]; ++p) {
        compare(packed + p * lanes * dim, dim, x, stride, count, dots.data());
        merging.best_lanes(dots.data(), count, sign, p * lanes, best, at);
      }
    };
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles, start = item % tiles * kTile, count = std::min(kTile, n - start);
      const T* const rows = static_cast<const T*>(keys.const_data_ptr()) + b * keys.stride(0) + start * keys.stride(1);
      const A* x = wide.data();
      int64_t stride = unit_stride(dim);
      if constexpr (std::is_same_v<T, A>) {
        x = rows;
        stride = keys.stride(1);
      } else {
        for (int64_t j = 0; j < count; ++j)
          similarity_kernels<T>().widen(rows + j * keys.stride(1), dim, wide.data() + j * stride);
      }
      nearest(b, x, stride, count, best, at);
      const uint8_t* const takes_part = mask.row(b);
      for (int64_t j = 0; j < count; ++j) {
        const A* const row = x + j * stride;
        A value = likeness.euclidean ? -std::sqrt(-best[j]) : best[j];
        if (!likeness.euclidean) {
          const A norm = norm_from_squares(similarity_kernels<A>().dot(row, row, dim));
          if (std::isfinite(norm)) {
            value /= norm;
          } else {  // the squares overflow: normalise before the products, as the contract has it
            normalize_row(kernels, row, dim, unit.data());
            nearest(b, unit.data(), dim, 1, best + j, at + j);
            value = best[j];
          }
        }
        const bool joins = at[j] >= 0 && value >= limit && (takes_part == nullptr || takes_part[start + j]);
        joined[b * n + start + j] = joins ? panels.slot[at[j]] : -1;
      }
    }
  });
}

Tensor assign(const Tensor& keys_in, const Tensor& targets, const OptionalTensor& mask, const Likeness& likeness) {
  const Tensor keys = with_contiguous_rows(keys_in);
  const int64_t batch = keys.size(0), n = keys.size(1);
  Tensor assignment = new_empty(keys, {batch, n}, ScalarType::Long);
  int64_t* const joined = assignment.mutable_data_ptr<int64_t>();
  dispatch_floating(keys.scalar_type(), [&](auto tag) {
    join_nearest<typename decltype(tag)::type>(keys, targets, MaskRows(mask), likeness, joined);
  });
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* target = targets.const_data_ptr<int64_t>() + b * targets.stride(0);
    for (int64_t c = 0; c < targets.size(1); ++c)
      if (target[c] >= 0) joined[b * n + target[c]] = likeness.include_targets ? c : -1;
  }
  return assignment;
}

// The tokens of every slot of every sample that count, in ascending order, and the sum of their weights.
struct Members {
  // Those of slot c of sample b are token[begin[b * (slots + 1) + c]] .. up to the begin of the next.
  std::vector<int64_t> begin, token;
};

template <class A>
Members list_members(const int64_t* joined, const A* weights, int64_t batch, int64_t n, int64_t slots, A* sizes) {
  Members members{std::vector<int64_t>(batch * (slots + 1)), std::vector<int64_t>(batch * n)};
  parallel_for(batch, 1 + 16384 / (n + slots + 1), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t* const begin = members.begin.data() + b * (slots + 1);
      const int64_t* const slot = joined + b * n;
      A* const size = sizes + b * slots;
      const auto counts = [&](int64_t i) { return slot[i] >= 0 && (weights == nullptr || weights[b * n + i] > 0); };
      std::fill(size, size + slots, A(0));
      for (int64_t i = 0; i < n; ++i) {
        if (!counts(i)) continue;
        ++begin[slot[i]];
        size[slot[i]] += weights == nullptr ? A(1) : weights[b * n + i];
      }
      int64_t next = b * n;
      for (int64_t c = 0; c <= slots; ++c) next += std::exchange(begin[c], next);
      std::vector<int64_t> free(begin, begin + slots);
      for (int64_t i = 0; i < n; ++i)
        if (counts(i)) members.token[free[slot[i]]++] = i;
    }
  });
  return members;
}

// merged[b, c] = the weighted mean of the tokens that joined c, 0 where there are none.
template <class T, class A>
void average(const Tensor& values, const A* weights, const Members& members, const A* sizes, int64_t slots, T* merged) {
  const auto& kernels = merging_kernels<T>();
  const int64_t batch = values.size(0), n = values.size(1), dim = values.size(2);
  const int64_t blocks = (dim + kColumns - 1) / kColumns;
  parallel_for(batch * blocks, 1 + 32768 / ((n + slots + 1) * kColumns), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t b = item / blocks, start = item % blocks * kColumns, length = std::min(kColumns, dim - start);
      const T* const columns = static_cast<const T*>(values.const_data_ptr()) + b * values.stride(0) + start;
      const int64_t* const begin = members.begin.data() + b * (slots + 1);
      for (int64_t c = 0; c < slots; ++c) {
        const int64_t count = begin[c + 1] - begin[c];
        kernels.mean_of(columns, values.stride(1), members.token.data() + begin[c], count,
                        weights == nullptr ? nullptr : weights + b * n, count > 0 ? sizes[b * slots + c] : A(1), length,
                        merged + (b * slots + c) * dim + start);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens(const Tensor& values_in, const Tensor& targets_in,
                                                const OptionalTensor& keys, const OptionalTensor& assignment_in,
                                                const OptionalTensor& weights_in, const OptionalTensor& mask,
                                                std::optional<double> threshold, std::string metric,
                                                bool include_targets) {
  const bool euclidean = check_merge_tokens(values_in, targets_in, keys, assignment_in, weights_in, mask, threshold,
                                            metric, include_targets)
                             .metric == 1;
  const Tensor values = with_contiguous_rows(values_in), targets = with_contiguous_rows(targets_in);
  const int64_t batch = values.size(0), n = values.size(1), dim = values.size(2), slots = targets.size(1);
  check_index_values("merge_tokens", "targets", targets, n);
  Tensor assignment;
  if (assignment_in) {
    const Tensor given = with_contiguous_rows(*assignment_in);
    check_index_values("merge_tokens", "assignment", given, slots);
    assignment = new_empty(values, {batch, n}, ScalarType::Long);
    for (int64_t b = 0; b < batch; ++b)
      std::copy_n(given.const_data_ptr<int64_t>() + b * given.stride(0), n,
                  assignment.mutable_data_ptr<int64_t>() + b * n);
  } else {
    assignment = assign(keys ? *keys : values, targets, mask, {euclidean, include_targets, threshold});
  }
  Tensor merged = new_empty(values, {batch, slots, dim}, values.scalar_type());
  Tensor sizes = new_empty(values, {batch, slots}, wide_type(values));
  OptionalTensor weights;
  if (weights_in) weights = contiguous_as(*weights_in, wide_type(values));
  dispatch_floating(values.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const A* const weight = weights ? static_cast<const A*>(weights->const_data_ptr()) : nullptr;
    A* const size = static_cast<A*>(sizes.mutable_data_ptr());
    const Members members = list_members(assignment.const_data_ptr<int64_t>(), weight, batch, n, slots, size);
    average(values, weight, members, size, slots, static_cast<T*>(merged.mutable_data_ptr()));
  });
  return {merged, sizes, assignment};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "merge_tokens", merge_tokens); }

}  // namespace tokenprune
