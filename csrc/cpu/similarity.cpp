// CPU kernels of cosine_scores and contrastive_scores.
//
// Both ops compare every feature with lists of rows: a maximum of cosines over one list and a mean over another.
// * mean: the mean of <u_j, u_r> over r is <u_j, mean of u_r>, so a list of any length costs one dot product per
// feature.
// * max: full panels of rows go through the panel kernel, the last few rows through dot products of their own.
// Features are read in their own dtype and never normalised: a cosine is a dot product with a unit row, divided by the
// feature's norm, and the division waits until after the reduction.

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/simd/rows.h"
#include "cpu/simd/similarity.h"
#include "dispatch.h"
#include "op.h"
#include "parallel.h"
#include "tokenprune/math.h"

namespace tokenprune {

namespace {

constexpr int64_t kTile =
    48;  // features that are multiplied with a panel together: a multiple of every capability's register tile

// Rows of every sample, sample b's at [begin[b], begin[b + 1]).
template <class T>
struct Lists {
  // Whatever memory the rows may need is asked for at once: growing would fill what there is before it failed.
  Lists(int64_t batch, int64_t most) {
    begin.reserve(batch + 1);
    begin.push_back(0);
    rows.reserve(most);
  }

  std::vector<const T*> rows;
  std::vector<int64_t> begin;

  int64_t size(int64_t b) const { return begin[b + 1] - begin[b]; }
  void end_of_sample() { begin.push_back(static_cast<int64_t>(rows.size())); }
};

// Unit rows of one list per sample, ready for the kernels. Of sample b: `panels` packed panels from first_panel[b],
// then first_single[b] .. first_single[b + 1] single rows.
template <class A>
struct Units {
  std::vector<int64_t> first_panel = {0}, first_single = {0};
  Tensor panels, singles;
};

template <class T>
Units<Wide<T>> unit_rows(const Tensor& like, const Lists<T>& lists, int64_t batch, int64_t dim) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes;
  Units<A> units;
  // Where the row of each slot comes from. A panel that is three quarters full is filled up by repeating its last row,
  // which changes no maximum; fewer rows than that are cheaper one by one.
  std::vector<const T*> packed, single;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = lists.begin[b], end = lists.begin[b + 1];
    const int64_t rest = (end - begin) % lanes, in_panels = 4 * rest > 3 * lanes ? end - begin : end - begin - rest;
    for (int64_t i = begin; i < begin + in_panels; ++i) packed.push_back(lists.rows[i]);
    while (packed.size() % lanes) packed.push_back(packed.back());
    for (int64_t i = begin + in_panels; i < end; ++i) single.push_back(lists.rows[i]);
    units.first_panel.push_back(static_cast<int64_t>(packed.size()) / lanes);
    units.first_single.push_back(static_cast<int64_t>(single.size()));
  }
  const int64_t n_packed = packed.size(), n_single = single.size(), grain = 1 + 32768 / (dim + 1);
  units.singles = new_empty(like, {n_single, dim}, wide_type(like));
  units.panels = new_empty(like, {n_packed, dim}, wide_type(like));
  A* singles = static_cast<A*>(units.singles.mutable_data_ptr());
  A* panels = static_cast<A*>(units.panels.mutable_data_ptr());
  parallel_for(n_single, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) normalize_row(kernels, single[i], dim, singles + i * dim);
  });
  if (n_packed > 0) {
    const Tensor scratch = new_empty(like, {n_packed, dim}, wide_type(like));
    A* rows = static_cast<A*>(scratch.mutable_data_ptr());
    parallel_for(n_packed / lanes, 1 + grain / lanes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * lanes; i < end * lanes; ++i) normalize_row(kernels, packed[i], dim, rows + i * dim);
      for (int64_t p = begin; p < end; ++p)
        kernels.pack_panel(rows + p * lanes * dim, dim, lanes, dim, panels + p * lanes * dim);
    });
  }
  return units;
}

// The sum of every sample's unit rows, [B, C]. Columns are split among the threads: each is summed in the order of
// rows.
template <class T>
Tensor unit_sums(const Tensor& like, const Lists<T>& lists, int64_t batch, int64_t dim) {
  using A = Wide<T>;
  const auto& kernels = similarity_kernels<T>();
  const int64_t count = lists.rows.size(), block = 512, blocks = (dim + block - 1) / block;
  std::vector<double> scale(count), total(batch * dim, 0.0);
  parallel_for(count, 1 + 32768 / (dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A squares = kernels.dot(lists.rows[i], lists.rows[i], dim);
      scale[i] = 1 / static_cast<double>(norm_from_squares(squares));
    }
  });
  Tensor sums = new_empty(like, {batch, dim}, wide_type(like));
  A* out = static_cast<A*>(sums.mutable_data_ptr());
  const int64_t work = (count / (batch + 1) + 1) * block;
  parallel_for(batch * blocks, 1 + 32768 / work, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, start = item % blocks * block;
      const int64_t length = dim - start < block ? dim - start : block;
      double* sum = total.data() + b * dim + start;
      for (int64_t i = lists.begin[b]; i < lists.begin[b + 1]; ++i)
        kernels.add_scaled(lists.rows[i] + start, length, scale[i], sum);
      for (int64_t d = 0; d < length; ++d) out[b * dim + start + d] = A(sum[d]);
    }
  });
  return sums;
}

// The rows with which one sample's features are multiplied.
template <class A>
struct ListedRows {
  const A *panels, *singles, *sum;  // sum is null when no mean is wanted
  int64_t n_panels, n_singles, n_sum, dim;
};

// max over the list of <x_j, unit row> and <x_j, sum of unit rows> for rows of type T, not yet divided by ||x_j||.
template <class T, class A>
void best_and_sum(const T* rows, const A* wide, int64_t row_stride, int64_t n, const ListedRows<A>& with, A* tile,
                  A* best, A* sum, A* squares) {
  const auto& few = similarity_kernels<T>();
  const RowKernels<A>& panel = row_kernels<A>();
  const int64_t lanes = panel.panel_lanes, dim = with.dim, size = n * lanes;
  for (int64_t p = 0; p < with.n_panels; ++p) {
    A* dots = p == 0 ? tile : tile + size;
    panel.panel_dots(with.panels + p * lanes * dim, dim, wide, std::is_same_v<T, A> ? row_stride : dim, n, dots);
    if (p > 0) few.max_into(dots, size, tile);
  }
  for (int64_t j = 0; j < n; j += 2) {  // in pairs; an odd last row is its own partner
    const int64_t pair = std::min<int64_t>(2, n - j);
    const T* const row[2] = {rows + j * row_stride, rows + (j + pair - 1) * row_stride};
    A most[2], dots[2 * kFew], own[2], *want_squares = own;
    for (int64_t r = 0; r < 2; ++r) most[r] = -std::numeric_limits<A>::infinity();
    if (with.n_panels > 0)
      for (int64_t r = 0; r < pair; ++r)
        for (int64_t l = 0; l < lanes; ++l) most[r] = nan_max(most[r], tile[(j + r) * lanes + l]);
    if (with.sum != nullptr) {
      few.few_dots(row, dim, with.sum, 0, 1, dots, want_squares);
      want_squares = nullptr;
      for (int64_t r = 0; r < pair; ++r) sum[j + r] = dots[r * kFew];
    }
    for (int64_t q = 0; q < with.n_singles; q += kFew) {
      const int count = static_cast<int>(std::min<int64_t>(kFew, with.n_singles - q));
      few.few_dots(row, dim, with.singles + q * dim, dim, count, dots, want_squares);
      want_squares = nullptr;
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < count; ++i) most[r] = nan_max(most[r], dots[r * kFew + i]);
    }
    if (want_squares != nullptr) few.few_dots(row, dim, nullptr, 0, 0, nullptr, want_squares);
    for (int64_t r = 0; r < pair; ++r) {
      best[j + r] = most[r];
      squares[j + r] = own[r];
    }
  }
}

// scores[b, j] = max over best_of of the cosines + sign * mean over mean_of; an empty list contributes 0.
template <class T>
Tensor score(const Tensor& features, const Lists<T>& best_of, const Lists<T>& mean_of, Wide<T> sign) {
  using A = Wide<T>;
  const int64_t batch = features.size(0), n = features.size(1), dim = features.size(2);
  const int64_t by_batch = features.stride(0), by_row = features.stride(1);
  Tensor scores = new_empty(features, {batch, n}, wide_type(features));
  if (batch * n == 0) return scores;
  const Units<A> units = unit_rows(features, best_of, batch, dim);
  const bool means = !mean_of.rows.empty();
  const Tensor sums = means ? unit_sums(features, mean_of, batch, dim) : scores;
  const T* rows = static_cast<const T*>(features.const_data_ptr());
  A* out = static_cast<A*>(scores.mutable_data_ptr());

  const RowKernels<A>& panel = row_kernels<A>();
  const auto& few = similarity_kernels<T>();
  const int64_t tiles = (n + kTile - 1) / kTile, items = batch * tiles, lanes = panel.panel_lanes;
  const int64_t listed = static_cast<int64_t>(best_of.rows.size()) / batch + means + 1;
  const int64_t work = std::min(n, kTile) * (listed + 1) * (dim + 1);
  const int64_t wanted = std::min<int64_t>(items, 1 + items * work / 65536);
  const int64_t chunks = wanted > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), wanted) : 1;
  const bool widen = !std::is_same_v<T, A> && units.first_panel[batch] > 0;
  // Per chunk: one normalised row, two tiles of dot products, and the features of a tile in the arithmetic type.
  const int64_t scratch = dim + 2 * kTile * lanes + (widen ? kTile * dim : 0);
  Tensor workspace = new_empty(features, {chunks, scratch}, wide_type(features));
  A* const spaces = static_cast<A*>(workspace.mutable_data_ptr());
  const A* const all_panels = static_cast<const A*>(units.panels.const_data_ptr());
  const A* const all_singles = static_cast<const A*>(units.singles.const_data_ptr());
  const A* const all_sums = static_cast<const A*>(sums.const_data_ptr());

  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    A *unit = spaces + first * scratch, *tile = unit + dim, *wide = tile + 2 * kTile * lanes;
    for (int64_t item = items * first / chunks; item < items * last / chunks; ++item) {
      const int64_t b = item / tiles, start = item % tiles * kTile, count = std::min(kTile, n - start);
      const T* x = rows + b * by_batch + start * by_row;
      const ListedRows<A> with{all_panels + units.first_panel[b] * lanes * dim,
                               all_singles + units.first_single[b] * dim,
                               mean_of.size(b) > 0 ? all_sums + b * dim : nullptr,
                               units.first_panel[b + 1] - units.first_panel[b],
                               units.first_single[b + 1] - units.first_single[b],
                               mean_of.size(b),
                               dim};
      const bool listed_best = best_of.size(b) > 0;
      A best[kTile], sum[kTile] = {}, squares[kTile];
      const A* keys = nullptr;
      if constexpr (std::is_same_v<T, A>) {
        keys = x;
      } else if (with.n_panels > 0) {
        for (int64_t j = 0; j < count; ++j) few.widen(x + j * by_row, dim, wide + j * dim);
        keys = wide;
      }
      best_and_sum(x, keys, by_row, count, with, tile, best, sum, squares);
      for (int64_t j = 0; j < count; ++j) {
        A norm = norm_from_squares(squares[j]);
        if (!std::isfinite(norm)) {  // the squares overflow: normalise before the products, as the contract has it
          normalize_row(panel, x + j * by_row, dim, unit);
          best_and_sum<A, A>(unit, unit, dim, 1, with, tile, best + j, sum + j, squares + j);
          norm = 1;
        }
        const A most = listed_best ? best[j] / norm : A(0);
        const A mean = with.sum != nullptr ? sum[j] / norm / A(with.n_sum) : A(0);
        out[b * n + start + j] = most + sign * mean;
      }
    }
  });
  return scores;
}

Tensor cosine_scores(const Tensor& features_in, const Tensor& queries_in, const OptionalTensor& query_mask,
                     std::string reduction) {
  const bool mean = check_cosine_scores(features_in, queries_in, query_mask, reduction).reduction == 1;
  const Tensor features = with_contiguous_rows(features_in), queries = with_contiguous_rows(queries_in);
  const int64_t batch = queries.size(0), m = queries.size(1);
  const uint8_t* valid = mask_bytes(query_mask);
  return dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* rows = static_cast<const T*>(queries.const_data_ptr());
    Lists<T> listed(batch, batch * m), none(batch, 0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < m; ++i)
        if (!valid || valid[b * query_mask->stride(0) + i * query_mask->stride(1)])
          listed.rows.push_back(rows + b * queries.stride(0) + i * queries.stride(1));
      listed.end_of_sample();
      none.end_of_sample();
    }
    return mean ? score(features, none, listed, Wide<T>(1)) : score(features, listed, none, Wide<T>(1));
  });
}

template <class T>
Lists<T> rows_at(const Tensor& features, const Tensor& indices) {
  const T* rows = static_cast<const T*>(features.const_data_ptr());
  Lists<T> listed(indices.size(0), indices.numel());
  for (int64_t b = 0; b < indices.size(0); ++b) {
    const int64_t* index = indices.const_data_ptr<int64_t>() + b * indices.stride(0);
    for (int64_t i = 0; i < indices.size(1); ++i)
      if (index[i] >= 0) listed.rows.push_back(rows + b * features.stride(0) + index[i] * features.stride(1));
    listed.end_of_sample();
  }
  return listed;
}

Tensor contrastive_scores(const Tensor& features_in, const Tensor& anchors_in, const Tensor& references_in) {
  check_contrastive_scores(features_in, anchors_in, references_in);
  const Tensor features = with_contiguous_rows(features_in);
  const Tensor anchors = with_contiguous_rows(anchors_in), references = with_contiguous_rows(references_in);
  check_index_values("contrastive_scores", "anchor_indices", anchors, features.size(1));
  check_index_values("contrastive_scores", "reference_indices", references, features.size(1));
  return dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return score(features, rows_at<T>(features, anchors), rows_at<T>(features, references), Wide<T>(-1));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  TOKENPRUNE_IMPL(m, "cosine_scores", cosine_scores);
  TOKENPRUNE_IMPL(m, "contrastive_scores", contrastive_scores);
}

}  // namespace tokenprune
