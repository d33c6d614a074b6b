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

constexpr int64_t kTile = 96;  // tokens of a tile, whole panels: two tiles compare in the second-level cache
constexpr int64_t kStoredTokens = 60 * kTile;  // 64 MiB of float32, each pair once

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
  // The first panel of a tile, or the one after the last tile.
  int64_t panel_of(int64_t tile) const { return std::min(tile * kTile / lanes, panels()); }
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
  const int64_t panels = points.panels(), lanes = points.lanes, dim = points.dim, block = kernels.panel_block;
  points.packed = new_empty(features, {panels * lanes, dim}, wide_type(features));
  points.square.resize(panels * lanes);
  A* const packed = static_cast<A*>(points.packed.mutable_data_ptr());
  parallel_for(panels, 1 + 1024 / (dim + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> wide(lanes * block);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = std::min(lanes, points.size() - p * lanes);
      A* const panel = packed + p * lanes * dim;
      for (int64_t d = 0; d < dim; d += block) {
        const int64_t length = std::min(block, dim - d);
        for (int64_t l = 0; l < count; ++l)
          similarity_kernels<T>().widen(points.row[p * lanes + l] + d, length, wide.data() + l * block);
        kernels.pack_panel(wide.data(), block, count, length, panel + d * lanes);
      }
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

// The squared distances of the tokens of one tile to those of another, in rows `stride` apart; of a tile to itself, with
// `once`, each pair of panels once, the panel in the row being the earlier one. Dimensions are taken block by block, so
// that a block of both tiles stays in the second-level cache; the sums are those of panel_squares.
template <class T>
void compare_tiles(const Points<T>& points, int64_t tile, int64_t other, bool once, Wide<T>* rows, int64_t stride) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t dim = points.dim, lanes = points.lanes, first = other * kTile;
  const int64_t width = std::min(kTile, points.size() - first);
  for (int64_t d = 0; d < dim; d += kernels.panel_block) {
    const int64_t length = std::min(kernels.panel_block, dim - d);
    for (int64_t p = points.panel_of(tile); p < points.panel_of(tile + 1); ++p)
      for (int64_t q = once ? std::max(p, points.panel_of(other)) : points.panel_of(other);
           q < points.panel_of(other + 1); ++q)
        kernels.panel_products(points.panel(p) + d * lanes, points.panel(q) + d * lanes, length, d > 0,
                               rows + (p * lanes - tile * kTile) * stride + q * lanes - first, stride);
  }
  for (int64_t i = tile * kTile; i < std::min(points.size(), (tile + 1) * kTile); ++i, rows += stride) {
    const A own = points.square[i];
    for (int64_t j = 0; j < width; ++j) {
      const A square = (own + points.square[first + j]) - 2 * (dim > 0 ? rows[j] : A(0));
      rows[j] = square < 0 ? A(0) : square;
    }
    if (points.small) continue;
    for (int64_t j = 0; j < width; ++j)  // what overflows may still have a distance
      if (!is_small(own) || !is_small(points.square[first + j]))
        rows[j] = squared_difference(points.row[i], points.row[first + j], dim);
  }
}

// Where the distances of a pair of tiles are, tile <= other, in memory that has every pair once.
int64_t block_of(int64_t tile, int64_t other) { return (other * (other + 1) / 2 + tile) * kTile * kTile; }

// The squared distances of every pair of tiles, in rows of kTile. In that of a tile and itself the panels below the
// diagonal are left out.
template <class T>
void fill_blocks(const Points<T>& points, Wide<T>* blocks) {
  const int64_t tiles = points.tiles();
  std::vector<std::pair<int64_t, int64_t>> pairs;  // those of a tile and itself first, which are half the work
  for (int64_t apart = 0; apart < tiles; ++apart)
    for (int64_t t = 0; t + apart < tiles; ++t) pairs.emplace_back(t, t + apart);
  parallel_for(pairs.size(), 1 + 65536 / (kTile * kTile * (points.dim + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const auto [tile, other] = pairs[item];
      compare_tiles(points, tile, other, true, blocks + block_of(tile, other), kTile);
    }
  });
}

// What compare_tiles writes of two tiles, from the block of the pair: mirrored where `other` is the earlier one.
template <class A>
void read_block(const A* blocks, int64_t tile, int64_t other, A* rows, int64_t stride) {
  const A* const block = blocks + block_of(std::min(tile, other), std::max(tile, other));
  for (int64_t i = 0; i < kTile; ++i, rows += stride) {
    const int64_t mirrored = tile < other ? 0 : tile > other ? kTile : i;
    for (int64_t j = 0; j < mirrored; ++j) rows[j] = block[j * kTile + i];
    std::copy(block + i * kTile + mirrored, block + (i + 1) * kTile, rows + mirrored);
  }
}

// f(i, the squared distances of token i to all) for every token; `blocks` have them, or they are computed now.
template <class T, class F>
void over_rows(const Points<T>& points, const Wide<T>* blocks, const F& f) {
  const int64_t n = points.size(), tiles = points.tiles(), width = tiles * kTile;
  parallel_for(tiles, 1 + 65536 / (kTile * n * (points.dim + 1) + 1), [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> rows(kTile * width);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t other = 0; other < tiles; ++other) {
        Wide<T>* const at = rows.data() + other * kTile;
        if (blocks == nullptr)
          compare_tiles(points, t, other, false, at, width);
        else
          read_block(blocks, t, other, at, width);
      }
      for (int64_t i = t * kTile; i < std::min(n, (t + 1) * kTile); ++i) f(i, rows.data() + (i - t * kTile) * width);
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
  const Tensor memory = new_empty(like, {stored ? block_of(0, points.tiles()) : 0}, wide_type(like));
  A* const blocks = stored ? static_cast<A*>(memory.mutable_data_ptr()) : nullptr;
  if (stored) fill_blocks(points, blocks);
  std::vector<A> widest(n, A(0));
  over_rows(points, blocks, [&](int64_t i, const A* row) {
    mean[i] = mean_of_smallest(row, n, std::min(neighbors, n), channels);
    widest[i] = density_kernels<A>().largest(row, n);
  });
  A most = 0;
  for (const A wide : widest) most = std::max(most, wide);
  over_rows(points, blocks, [&](int64_t i, const A* row) {
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
