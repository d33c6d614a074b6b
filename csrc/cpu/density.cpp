// CPU kernel of density_peaks: two passes over the squared distances of all pairs of valid tokens.
//
// |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>, where both sides sum in the same order, so that equal tokens have a distance of
// exactly 0, and integers an exact one. A tile of distances feeds the tokens of both of its sides, so that each pair is
// compared once; kStoredTiles of them stay in memory for the second pass, which compares the others again. What a token
// keeps of the distances that it has seen depends on no order: its smallest, the largest, the smallest to a denser one.
// Masked tokens are left out from the start: all that follows knows the valid ones only, in their order.

#include <cmath>
#include <limits>
#include <mutex>
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
constexpr int64_t kStoredTiles = 60 * 61 / 2;  // of distances: 64 MiB of float32, all pairs of 5760 tokens

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

// The squared distances of the tokens of one tile to those of another that is not earlier, in rows of kTile; of a tile to
// itself each pair of panels once, the panel in the row being the earlier one. Dimensions are taken block by block, so
// that a block of both tiles stays in the second-level cache; the sums are those of panel_squares.
template <class T>
void compare_tiles(const Points<T>& points, int64_t tile, int64_t other, Wide<T>* rows) {
  using A = Wide<T>;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t dim = points.dim, lanes = points.lanes, first = other * kTile;
  const int64_t width = std::min(kTile, points.size() - first);
  for (int64_t d = 0; d < dim; d += kernels.panel_block) {
    const int64_t length = std::min(kernels.panel_block, dim - d);
    for (int64_t p = points.panel_of(tile); p < points.panel_of(tile + 1); ++p)
      for (int64_t q = std::max(p, points.panel_of(other)); q < points.panel_of(other + 1); ++q)
        kernels.panel_products(points.panel(p) + d * lanes, points.panel(q) + d * lanes, length, d > 0,
                               rows + (p * lanes - tile * kTile) * kTile + q * lanes - first, kTile);
  }
  for (int64_t i = tile * kTile; i < std::min(points.size(), (tile + 1) * kTile); ++i, rows += kTile) {
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

// Distances of pairs of tiles that stay in memory.
struct Stored {
  Tensor memory;
  std::vector<uint8_t> filled;
};

template <class T>
Stored reserve_tiles(const Points<T>& points, const Tensor& like) {
  const int64_t count = std::min(points.tiles() * (points.tiles() + 1) / 2, kStoredTiles);
  return {new_empty(like, {count, kTile, kTile}, wide_type(like)), std::vector<uint8_t>(count)};
}

// f(i, the squared distances of token i to those of a tile, the first of these, their number) for every token of tiles
// [first, last) and every tile, in any order, but no two at once of tokens of the same tile.
template <class T, class F>
void over_rows(const Points<T>& points, Stored& stored, int64_t first, int64_t last, const F& f) {
  using A = Wide<T>;
  const int64_t n = points.size(), tiles = points.tiles(), pairs = tiles * (tiles + 1) / 2;
  const int64_t kept = stored.filled.size();
  A* const memory = static_cast<A*>(stored.memory.mutable_data_ptr());
  std::vector<std::mutex> busy(tiles);
  const auto wanted = [&](int64_t tile) { return first <= tile && tile < last; };
  const auto feed = [&](int64_t tile, int64_t other, const A* rows) {
    if (!wanted(tile)) return;
    const std::lock_guard<std::mutex> alone(busy[tile]);
    for (int64_t i = tile * kTile; i < std::min(n, (tile + 1) * kTile); ++i, rows += kTile)
      f(i, rows, other * kTile, std::min(kTile, n - other * kTile));
  };
  parallel_for(pairs, 1 + 65536 / (kTile * kTile * (points.dim + 1)), [&](int64_t begin, int64_t end) {
    std::vector<A> space(2 * kTile * kTile);
    // Those of a tile and itself come first, which are half the work, then those of neighbours, and so on.
    for (int64_t pair = begin, tile = begin, apart = 0; pair < end; ++pair, ++tile) {
      for (; tile >= tiles - apart; ++apart) tile -= tiles - apart;
      const int64_t other = tile + apart;
      if (!wanted(tile) && !wanted(other)) continue;
      // What stays is spread over all pairs: every thread has its share of it.
      const int64_t slot = pair * kept / pairs;
      const bool stays = (pair + 1) * kept / pairs > slot;
      A* const rows = stays ? memory + slot * kTile * kTile : space.data();
      if (!stays || !stored.filled[slot]) compare_tiles(points, tile, other, rows);
      if (stays) stored.filled[slot] = 1;
      A* const mirrored = apart == 0 ? rows : space.data() + kTile * kTile;
      for (int64_t i = 0; i < kTile; ++i)
        for (int64_t j = 0; j < (apart == 0 ? i : kTile); ++j) mirrored[i * kTile + j] = rows[j * kTile + i];
      feed(tile, other, rows);
      if (apart > 0) feed(other, tile, mirrored);
    }
  });
}

// Adds the numbers of a row to a heap of the `limit` smallest so far, the largest in front.
template <class A>
void add_smallest(const A* row, int64_t n, int64_t limit, A* heap, int64_t& held) {
  for (int64_t j = 0; j < n; ++j) {
    if (held == limit) {
      j = density_kernels<A>().next_below(row, j, n, *heap);
      if (j == n) return;
      std::pop_heap(heap, heap + held);
      heap[held - 1] = row[j];
    } else {
      if (row[j] != row[j]) continue;
      heap[held++] = row[j];
    }
    std::push_heap(heap, heap + held);
  }
}

// m_i: the mean of the `neighbors` smallest squared distances of every token (of what there is), over the channels; NaN
// without any. Returns the largest of all. Tokens whose heaps fit into the memory of the stored tiles go together.
template <class T>
Wide<T> find_means(const Points<T>& points, Stored& stored, int64_t neighbors, int64_t channels, Wide<T>* mean) {
  using A = Wide<T>;
  const int64_t n = points.size(), tiles = points.tiles();
  const int64_t together = std::min(tiles, std::max<int64_t>(1, kStoredTiles * kTile / neighbors));
  std::vector<A> heaps(together * kTile * neighbors), widest(n, A(0));
  for (int64_t first = 0; first < tiles; first += together) {
    const int64_t begin = first * kTile, count = std::min(n - begin, together * kTile);
    std::vector<int64_t> held(count);
    over_rows(points, stored, first, first + together, [&](int64_t i, const A* row, int64_t, int64_t width) {
      add_smallest(row, width, neighbors, heaps.data() + (i - begin) * neighbors, held[i - begin]);
      widest[i] = std::max(widest[i], density_kernels<A>().largest(row, width));
    });
    parallel_for(count, 1 + 4096 / neighbors, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        A* const heap = heaps.data() + i * neighbors;
        std::sort(heap, heap + held[i]);
        double sum = 0;
        for (int64_t s = 0; s < held[i]; ++s) sum += heap[s];
        mean[begin + i] = static_cast<A>(sum) / static_cast<A>(held[i] * channels);
      }
    });
  }
  return *std::max_element(widest.begin(), widest.end());
}

// Means and distances of the packed tokens of one sample.
template <class T>
void find_peaks(const Points<T>& points, const Tensor& like, int64_t neighbors, std::vector<Wide<T>>& mean,
                std::vector<Wide<T>>& distance) {
  using A = Wide<T>;
  const int64_t n = points.size(), channels = std::max<int64_t>(points.dim, 1);
  if (n == 0) return;
  Stored stored = reserve_tiles(points, like);
  const A most = find_means(points, stored, std::min(neighbors, n), channels, mean.data());
  std::fill_n(distance.begin(), n, std::numeric_limits<A>::quiet_NaN());
  over_rows(points, stored, 0, points.tiles(), [&](int64_t i, const A* row, int64_t first, int64_t width) {
    const int64_t before = std::clamp<int64_t>(i - first, 0, width);
    const A closest = density_kernels<A>().nearest_denser(row, mean.data() + first, width, before, mean[i]);
    if (closest == closest && !(distance[i] <= closest)) distance[i] = closest;
  });
  for (int64_t i = 0; i < n; ++i)
    distance[i] = std::sqrt((distance[i] == distance[i] ? distance[i] : most) / static_cast<A>(channels));
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
