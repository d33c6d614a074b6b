// Dot products of many rows with a panel of rows, the building block of QK^T, cosine rows and greedy updates.
//
// A panel holds kPanelLanes rows transposed: panel[d * lanes + l]. Its rows lie in vector lanes and the other side (the
// keys) is read in its natural layout, one broadcast per element. Results come key by key with the panel's rows side by
// side, out[key * lanes + l]: reductions over keys, such as a softmax, are then plain vertical vector operations.
// Sums run over d in increasing order within blocks of kBlock, so results do not depend on how keys are split.
#pragma once

#include "cpu/simd/vec.h"

namespace tokenprune::TOKENPRUNE_SIMD {

template <class A>
constexpr int kPanelLanes = 2 * kWidth<A>;
constexpr int64_t kBlock = 256;  // a block of the panel stays in the first-level cache

// Transpose `n` rows (at most kPanelLanes) into a panel; missing lanes are zero.
template <class A>
TOKENPRUNE_INLINE void pack_panel(const A* rows, int64_t row_stride, int64_t n, int64_t dim, A* panel) {
  constexpr int lanes = kPanelLanes<A>;
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t l = 0; l < lanes; ++l) panel[d * lanes + l] = l < n ? rows[l * row_stride + d] : A(0);
}

template <class A, int keys>
TOKENPRUNE_INLINE void panel_tile(const A* panel, int64_t dim, const A* key, int64_t key_stride, bool add, A* out) {
  constexpr int width = kWidth<A>, lanes = kPanelLanes<A>;
  Vec<A> low[keys], high[keys];
#pragma GCC unroll 16
  for (int j = 0; j < keys; ++j) low[j] = high[j] = Vec<A>{};
  for (int64_t d = 0; d < dim; ++d) {
    const Vec<A> a = load(panel + d * lanes), b = load(panel + d * lanes + width);
#pragma GCC unroll 16
    for (int j = 0; j < keys; ++j) {
      const Vec<A> x = splat(key[j * key_stride + d]);
      low[j] += x * a;
      high[j] += x * b;
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < keys; ++j) {
    A* o = out + j * lanes;
    store(o, add ? load(o) + low[j] : low[j]);
    store(o + width, add ? load(o + width) + high[j] : high[j]);
  }
}

// out[key][lane] = <keys[key], panel row lane> for all keys.
template <class A>
TOKENPRUNE_INLINE void panel_dots(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys,
                                  A* out) {
  constexpr int lanes = kPanelLanes<A>;
  if (dim == 0) std::memset(out, 0, n_keys * lanes * sizeof(A));
  for (int64_t start = 0; start < dim; start += kBlock) {
    const int64_t length = dim - start < kBlock ? dim - start : kBlock;
    const A* block = panel + start * lanes;
    const A* key = keys + start;
    int64_t j = 0;
    for (; j + kTileKeys <= n_keys; j += kTileKeys)
      panel_tile<A, kTileKeys>(block, length, key + j * key_stride, key_stride, start > 0, out + j * lanes);
    for (; j < n_keys; ++j) panel_tile<A, 1>(block, length, key + j * key_stride, key_stride, start > 0, out + j * lanes);
  }
}

// <a, b>, summed in four interleaved vectors.
template <class A>
TOKENPRUNE_INLINE A dot(const A* a, const A* b, int64_t dim) {
  constexpr int width = kWidth<A>;
  Vec<A> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * width <= dim; d += 4 * width)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] += load(a + d + u * width) * load(b + d + u * width);
  for (; d + width <= dim; d += width) sum[0] += load(a + d) * load(b + d);
  A tail = 0;
  for (; d < dim; ++d) tail += a[d] * b[d];
  return horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

}  // namespace tokenprune::TOKENPRUNE_SIMD
