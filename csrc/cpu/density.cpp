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
#include "cpu/simd/density.h"
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
  const A* panel(int64_t p) const { return static_cast<const A*>(packed.const_data_ptr()) + p * lanes * dim; }
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

// The squared distances of tokens start .. start + count to all tokens from panel `first_panel` on, a row of `width` each.
// Dimensions are taken block by block, so that a block of the tokens stays in the first-level cache for all panels; the
// sums are those of panel_squares.
template <class T>
void compare_tile(const Points<T>& points, int64_t start, int64_t count, int64_t first_panel, Wide<T>* rows) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t dim = points.dim, lanes = points.lanes, width = points.panels() * lanes - first_panel * lanes;
  const int64_t block = kernels.panel_block;
  std::vector<A> wide(count * block), dots(count * lanes);
  std::fill(rows, rows + count * width, A(0));
  for (int64_t d = 0; d < dim; d += block) {
    const int64_t length = std::min(block, dim - d);
    for (int64_t r = 0; r < count; ++r)
      similarity_kernels<T>().widen(points.row[start + r] + d, length, wide.data() + r * block);
    for (int64_t p = first_panel; p < points.panels(); ++p) {
      kernels.panel_dots(points.panel(p) + d * lanes, length, wide.data(), block, count, dots.data());
      for (int64_t r = 0; r < count; ++r)
        for (int64_t l = 0; l < lanes; ++l) rows[r * width + (p - first_panel) * lanes + l] += dots[r * lanes + l];
    }
  }
  const A* const of_other = points.square.data() + first_panel * lanes;
  for (int64_t r = 0; r < count; ++r) {
    A* const row = rows + r * width;
    const A own = points.square[start + r];
    for (int64_t j = 0; j < width; ++j) {
      const A square = (own + of_other[j]) - 2 * row[j];
      row[j] = square < 0 ? A(0) : square;
    }
    if (points.small) continue;
    for (int64_t j = 0; first_panel * lanes + j < points.size(); ++j)  // what overflows may still have a distance
      if (!is_small(own) || !is_small(of_other[j]))
        row[j] = squared_difference(points.row[start + r], points.row[first_panel * lanes + j], dim);
  }
}

// All squared distances, each pair once, written to both of its places.
template <class T>
void fill_square(const Points<T>& points, Wide<T>* square) {
  using A = Wide<T>;
  const int64_t n = points.size(), lanes = points.lanes, tiles = points.tiles();
  const auto fill = [&](int64_t t, A* rows) {
    const int64_t start = t * kTile, end = std::min(n, start + kTile), first = start / lanes * lanes;
    const int64_t width = points.panels() * lanes - first;
    compare_tile(points, start, end - start, first / lanes, rows);
    for (int64_t i = start; i < end; ++i)
      std::copy(rows + (i - start) * width + i - first, rows + (i - start) * width + n - first, square + i * n + i);
    for (int64_t j = start + 1; j < n; ++j)
      for (int64_t i = start; i < std::min(end, j); ++i) square[j * n + i] = rows[(i - start) * width + j - first];
  };
  // The later a tile, the fewer tokens come after it: an early and a late one together are always the same work.
  parallel_for((tiles + 1) / 2, points.grain(), [&](int64_t begin, int64_t end) {
    std::vector<A> rows(kTile * points.panels() * lanes);
    for (int64_t early = begin; early < end; ++early) {
      fill(early, rows.data());
      if (tiles - 1 - early != early) fill(tiles - 1 - early, rows.data());
    }
  });
}

// f(i, the squared distances of token i to all) for every token; `square` has them, or they are computed now.
template <class T, class F>
void over_rows(const Points<T>& points, const Wide<T>* square, const F& f) {
  const int64_t n = points.size(), width = points.panels() * points.lanes;
  parallel_for(points.tiles(), points.grain(), [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> computed(square == nullptr ? kTile * width : 0);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t start = t * kTile, count = std::min(kTile, n - start);
      if (square == nullptr) compare_tile(points, start, count, 0, computed.data());
      for (int64_t r = 0; r < count; ++r)
        f(start + r, square == nullptr ? computed.data() + r * width : square + (start + r) * n);
    }
  });
}

// m_i: the mean of the `neighbors` smallest numbers of a row (of what there is), over the channels; NaN without any.
template <class A>
A mean_of_smallest(const A* row, int64_t n, int64_t neighbors, int64_t channels) {
  const DensityKernels<A>& kernels = density_kernels<A>();
  std::vector<A> nearest;  // a heap with the largest in front
  for (int64_t j = 0; j < n; ++j) {
    if (static_cast<int64_t>(nearest.size()) == neighbors) {
      j = kernels.next_below(row, j, n, nearest.front());
      if (j == n) break;
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
    widest[i] = density_kernels<A>().largest(row, n);
  });
  A most = 0;
  for (const A wide : widest) most = std::max(most, wide);
  over_rows(points, square, [&](int64_t i, const A* row) {
    const A closest = density_kernels<A>().nearest_denser(row, mean.data(), n, i);
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
