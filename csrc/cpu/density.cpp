// CPU kernel of density_peaks: two passes over the squared distances of all pairs of valid tokens.
//
// |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, where both sides sum in the same order, so that equal tokens have a distance of
// exactly 0, and integers an exact one. Up to kStoredTokens the distances are computed once, each pair once, and stay
// in memory for the second pass; beyond, both passes compute the rows of a few tokens at a time. Masked tokens are left
// out from the start: all that follows knows the valid ones only, in their order.

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/selection_choose.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/similarity.h"
#include "dispatch.h"
#include "op.h"
#include "parallel.h"

namespace tokenprune {

namespace {

constexpr int64_t kStoredTokens = 4096;  // 64 MiB of float32
constexpr int64_t kTile = 48;            // tokens that are compared with a panel together

// Does nothing overflow that is made of two such squares?
template <class A>
bool is_small(A square) {
  return square < std::numeric_limits<A>::max() / 4;
}

// The valid tokens of one sample, packed.
template <class T>
struct Points {
  using A = Wide<T>;
  std::vector<const T*> row;
  Tensor packed;
  std::vector<A> square;  // <x, x>
  bool small = true;      // are all squares?
  int64_t dim, lanes;

  int64_t size() const { return static_cast<int64_t>(row.size()); }
  int64_t panels() const { return (size() + lanes - 1) / lanes; }
  int64_t tiles() const { return (size() + kTile - 1) / kTile; }
  // Tiles, or pairs of them, that are worth a thread.
  int64_t grain() const { return 1 + 65536 / (kTile * size() * (dim + 1) + 1); }
};

template <class T>
Points<T> pack_points(const Tensor& features, int64_t b, const uint8_t* mask) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  Points<T> points;
  points.dim = features.size(2);
  points.lanes = kernels.panel_lanes;
  for (int64_t i = 0; i < features.size(1); ++i)
    if (mask == nullptr || mask[i])
      points.row.push_back(static_cast<const T*>(features.const_data_ptr()) + b * features.stride(0) +
                           i * features.stride(1));
  const int64_t panels = points.panels(), lanes = points.lanes, dim = points.dim;
  points.packed = new_empty(features, {panels * lanes, dim}, wide_type(features));
  points.square.resize(panels * lanes);
  A* const packed = static_cast<A*>(points.packed.mutable_data_ptr());
  parallel_for(panels, 1 + 1024 / (dim + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> wide(lanes * dim);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = std::min(lanes, points.size() - p * lanes);
      A* const panel = packed + p * lanes * dim;
      for (int64_t l = 0; l < count; ++l)
        similarity_kernels<T>().widen(points.row[p * lanes + l], dim, wide.data() + l * dim);
      kernels.pack_panel(wide.data(), dim, count, dim, panel);
      kernels.panel_squares(panel, dim, points.square.data() + p * lanes);
    }
  });
  for (const A square : points.square) points.small = points.small && is_small(square);
  return points;
}

template <class T>
Wide<T> squared_difference(const T* x, const T* y, int64_t dim) {
  Wide<T> sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const Wide<T> gap = Wide<T>(to_float(x[d])) - Wide<T>(to_float(y[d]));
    sum += gap * gap;
  }
  return sum;
}

// take(panel, tile) for all panels from `first_panel` on: tile[r * lanes + l] is the squared distance of token start +
// r and lane l of the panel.
template <class T, class F>
void compare_tile(const Points<T>& points, int64_t start, int64_t count, int64_t first_panel, const F& take) {
  using A = Wide<T>;
  const int64_t dim = points.dim, lanes = points.lanes;
  std::vector<A> wide(count * dim), tile(count * lanes);
  for (int64_t r = 0; r < count; ++r) similarity_kernels<T>().widen(points.row[start + r], dim, wide.data() + r * dim);
  const A* const packed = static_cast<const A*>(points.packed.const_data_ptr());
  for (int64_t p = first_panel; p < points.panels(); ++p) {
    row_kernels<A>().panel_dots(packed + p * lanes * dim, dim, wide.data(), dim, count, tile.data());
    const A* const of_lane = points.square.data() + p * lanes;
    for (int64_t r = 0; r < count; ++r) {
      A* const row = tile.data() + r * lanes;
      const A own = points.square[start + r];
      for (int64_t l = 0; l < lanes; ++l) {
        const A square = (own + of_lane[l]) - 2 * row[l];
        row[l] = square < 0 ? A(0) : square;
      }
      if (points.small) continue;
      for (int64_t l = 0; l < lanes && p * lanes + l < points.size(); ++l)  // what overflows may still have a distance
        if (!is_small(own) || !is_small(of_lane[l]))
          row[l] = squared_difference(points.row[start + r], points.row[p * lanes + l], dim);
    }
    take(p, tile.data());
  }
}

// All squared distances, each pair once, written to both of its places.
template <class T>
void fill_square(const Points<T>& points, Wide<T>* square) {
  const int64_t n = points.size(), lanes = points.lanes, tiles = points.tiles();
  const auto fill = [&](int64_t t) {
    const int64_t start = t * kTile, count = std::min(kTile, n - start);
    compare_tile(points, start, count, start / lanes, [&](int64_t p, const Wide<T>* tile) {
      for (int64_t j = std::max(p * lanes, start); j < std::min(n, (p + 1) * lanes); ++j)
        for (int64_t i = start; i < std::min(start + count, j + 1); ++i)
          square[i * n + j] = square[j * n + i] = tile[(i - start) * lanes + j - p * lanes];
    });
  };
  // The later a tile, the fewer tokens come after it: an early and a late one together are always the same work.
  parallel_for((tiles + 1) / 2, points.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t early = begin; early < end; ++early) {
      fill(early);
      if (tiles - 1 - early != early) fill(tiles - 1 - early);
    }
  });
}

// f(i, the squared distances of token i to all) for every token; `square` has them, or they are computed now.
template <class T, class F>
void over_rows(const Points<T>& points, const Wide<T>* square, const F& f) {
  const int64_t n = points.size(), lanes = points.lanes;
  parallel_for(points.tiles(), points.grain(), [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> computed(square == nullptr ? kTile * n : 0);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t start = t * kTile, count = std::min(kTile, n - start);
      if (square == nullptr)
        compare_tile(points, start, count, 0, [&](int64_t p, const Wide<T>* tile) {
          for (int64_t r = 0; r < count; ++r)
            std::copy_n(tile + r * lanes, std::min(lanes, n - p * lanes), computed.data() + r * n + p * lanes);
        });
      for (int64_t r = 0; r < count; ++r)
        f(start + r, square == nullptr ? computed.data() + r * n : square + (start + r) * n);
    }
  });
}

// m_i: the mean of the `neighbors` smallest numbers of a row (of what there is), over the channels; NaN without any.
template <class A>
A mean_of_smallest(const A* row, int64_t n, int64_t neighbors, int64_t channels) {
  std::vector<A> nearest;  // a heap with the largest in front
  for (int64_t j = 0; j < n; ++j) {
    if (static_cast<int64_t>(nearest.size()) == neighbors) {
      if (!(row[j] < nearest.front())) continue;
      std::pop_heap(nearest.begin(), nearest.end());
      nearest.back() = row[j];
    } else {
      if (row[j] != row[j]) continue;
      nearest.push_back(row[j]);
    }
    std::push_heap(nearest.begin(), nearest.end());
  }
  std::sort(nearest.begin(), nearest.end());
  double sum = 0;
  for (const A square : nearest) sum += square;
  return static_cast<A>(sum) / static_cast<A>(static_cast<int64_t>(nearest.size()) * channels);
}

// The smallest number among the squared distances of token i to denser tokens, NaN where there is none.
template <class A>
A nearest_denser(const A* row, const A* mean, int64_t n, int64_t i) {
  const A own = mean[i];
  A closest = std::numeric_limits<A>::infinity();
  bool found = false;
  const auto look = [&](int64_t j) {
    found = found || row[j] == row[j];
    closest = row[j] < closest ? row[j] : closest;
  };
  for (int64_t j = 0; j < i; ++j)
    if (mean[j] <= own) look(j);
  for (int64_t j = i + 1; j < n; ++j)
    if (mean[j] < own) look(j);
  return found ? closest : std::numeric_limits<A>::quiet_NaN();
}

// Means and distances of the packed tokens of one sample.
template <class T>
void find_peaks(const Points<T>& points, const Tensor& like, int64_t neighbors, std::vector<Wide<T>>& mean,
                std::vector<Wide<T>>& distance) {
  using A = Wide<T>;
  const int64_t n = points.size();
  const int64_t channels = std::max<int64_t>(points.dim, 1);
  const bool stored = n <= kStoredTokens;
  const Tensor memory = new_empty(like, {stored ? n : 0, n}, wide_type(like));
  A* const square = stored ? static_cast<A*>(memory.mutable_data_ptr()) : nullptr;
  if (stored) fill_square(points, square);
  std::vector<A> widest(n, A(0));
  over_rows(points, square, [&](int64_t i, const A* row) {
    mean[i] = mean_of_smallest(row, n, std::min(neighbors, n), channels);
    for (int64_t j = 0; j < n; ++j) widest[i] = row[j] > widest[i] ? row[j] : widest[i];
  });
  A most = 0;
  for (const A wide : widest) most = std::max(most, wide);
  over_rows(points, square, [&](int64_t i, const A* row) {
    const A closest = nearest_denser(row, mean.data(), n, i);
    distance[i] = std::sqrt((closest == closest ? closest : most) / static_cast<A>(channels));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> density_peaks(const Tensor& features_in, int64_t k, int64_t neighbors,
                                                         const OptionalTensor& mask_in) {
  check_density_peaks(features_in, k, neighbors, mask_in);
  const Tensor features = with_contiguous_rows(features_in);
  const MaskRows mask(mask_in);
  const int64_t batch = features.size(0), n = features.size(1);
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  Tensor density = new_empty(features, {batch, n}, wide_type(features));
  Tensor distance = new_empty(features, {batch, n}, wide_type(features));
  dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    using Key = decltype(order_key(A()));
    Workspace<Key> space(n);
    std::vector<A> mean(n), far(n);
    for (int64_t b = 0; b < batch; ++b) {
      const uint8_t* const valid = mask.row(b);
      const Points<T> points = pack_points<T>(features, b, valid);
      find_peaks(points, features, neighbors, mean, far);
      A* const dense = static_cast<A*>(density.mutable_data_ptr()) + b * n;
      A* const distant = static_cast<A*>(distance.mutable_data_ptr()) + b * n;
      for (int64_t i = 0, p = 0; i < n; ++i) {
        const bool takes_part = valid == nullptr || valid[i];
        dense[i] = takes_part ? std::exp(-mean[p]) : A(0);
        distant[i] = takes_part ? far[p] : A(0);
        space.keys[i] = order_key(takes_part ? std::log(far[p]) - mean[p] : A(0), takes_part);
        space.chosen[i] = 0;
        p += takes_part;
      }
      choose_best(space.keys.get(), n, k, space.scratch.get(), space.chosen.get());
      counts.mutable_data_ptr<int64_t>()[b] =
          list_ascending(space.chosen.get(), n, k, indices.mutable_data_ptr<int64_t>() + b * k);
    }
  });
  return {indices, counts, density, distance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "density_peaks", density_peaks); }

}  // namespace tokenprune
