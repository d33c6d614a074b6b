// Dot products of many rows with a panel of rows, the building block of QK^T, cosine rows and greedy updates.
//
// A panel holds kPanelLanes rows transposed: panel[d * lanes + l]. Its rows lie in vector lanes and the other side (the
// keys) is read in its natural layout, one broadcast per element. Results come key by key with the panel's rows side by
// side, out[key * lanes + l]: reductions over keys, such as a softmax, are then plain vertical vector operations.
// Sums run over d in increasing order within blocks of kBlock, so results do not depend on how keys are split.
#pragma once

#include "cpu/simd/vec.h"
#include "tokenprune/math.h"

namespace tokenprune::TOKENPRUNE_SIMD {

template <class A>
constexpr int kPanelLanes = 2 * kWidth<A>;
constexpr int64_t kBlock = 256;  // a block of the panel stays in the first-level cache

// to[d * to_stride + r] = rows[r][d] for four rows, in blocks of 4 x 4.
template <class A>
TOKENPRUNE_INLINE void transpose_four(const A* const (&rows)[4], int64_t dim, A* to, int64_t to_stride) {
  int64_t d = 0;
  if constexpr (kWidth<A> >= 4) {
    using Quad = typename VectorOfBytes<A, 4 * sizeof(A)>::type;
    for (; d + 4 <= dim; d += 4) {
      Quad q[4];
      for (int r = 0; r < 4; ++r) std::memcpy(&q[r], rows[r] + d, sizeof(Quad));
      const Quad low01 = shuffle<0, 4, 1, 5>(q[0], q[1]);
      const Quad high01 = shuffle<2, 6, 3, 7>(q[0], q[1]);
      const Quad low23 = shuffle<0, 4, 1, 5>(q[2], q[3]);
      const Quad high23 = shuffle<2, 6, 3, 7>(q[2], q[3]);
      const Quad columns[4] = {shuffle<0, 1, 4, 5>(low01, low23), shuffle<2, 3, 6, 7>(low01, low23),
                               shuffle<0, 1, 4, 5>(high01, high23), shuffle<2, 3, 6, 7>(high01, high23)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (d + i) * to_stride, &columns[i], sizeof(Quad));
    }
  }
  for (; d < dim; ++d)
    for (int r = 0; r < 4; ++r) to[d * to_stride + r] = rows[r][d];
}

// Transpose `n` rows (at most kPanelLanes) into a panel; missing lanes are zero.
template <class A>
TOKENPRUNE_INLINE void pack_panel(const A* rows, int64_t row_stride, int64_t n, int64_t dim, A* panel) {
  constexpr int lanes = kPanelLanes<A>;
  for (int64_t l = 0; l < lanes; l += 4) {
    if (l + 4 <= n) {
      const A* const four[4] = {rows + l * row_stride, rows + (l + 1) * row_stride, rows + (l + 2) * row_stride,
                                rows + (l + 3) * row_stride};
      transpose_four<A>(four, dim, panel + l, lanes);
      continue;
    }
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t r = l; r < l + 4; ++r) panel[d * lanes + r] = r < n ? rows[r * row_stride + d] : A(0);
  }
}

// A tile of `keys` x `vecs` vectors in registers; the panel holds `vecs` vectors per element. The sums, together with
// what `out` already holds if `add`, leave multiplied by `factor`. They are of products, or of squared differences.
// Element d of a key lies `step` times d from its first.
template <class A, int vecs, int keys, bool differences = false, int64_t step = 1>
TOKENPRUNE_INLINE void panel_tile(const A* panel, int64_t dim, const A* key, int64_t key_stride, bool add, A factor,
                                  A* out, int64_t out_stride) {
  constexpr int width = kWidth<A>;
  Vec<A> sum[keys][vecs];
#pragma GCC unroll 32
  for (int j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) sum[j][v] = Vec<A>{};
  for (int64_t d = 0; d < dim; ++d) {
    Vec<A> a[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) a[v] = load(panel + (d * vecs + v) * width);
#pragma GCC unroll 32
    for (int j = 0; j < keys; ++j) {
      const Vec<A> x = splat(key[j * key_stride + d * step]);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        if constexpr (differences) {
          const Vec<A> gap = x - a[v];
          sum[j][v] += gap * gap;
        } else {
          sum[j][v] += x * a[v];
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      A* o = out + j * out_stride + v * width;
      store(o, (add ? load(o) + sum[j][v] : sum[j][v]) * factor);
    }
}

// out[key * out_stride + lane] (+)= <key, panel row lane> over one block of dimensions.
template <class A, int vecs, bool differences = false>
TOKENPRUNE_INLINE void panel_block(const A* panel, int64_t dim, const A* key, int64_t key_stride, int64_t n_keys,
                                   bool add, A factor, A* out, int64_t out_stride) {
  constexpr int tile = kTileKeys * 2 / vecs;
  int64_t j = 0;
  for (; j + tile <= n_keys; j += tile)
    panel_tile<A, vecs, tile, differences>(panel, dim, key + j * key_stride, key_stride, add, factor,
                                           out + j * out_stride, out_stride);
  for (; j + 4 <= n_keys; j += 4)
    panel_tile<A, vecs, 4, differences>(panel, dim, key + j * key_stride, key_stride, add, factor, out + j * out_stride,
                                        out_stride);
  for (; j < n_keys; ++j)
    panel_tile<A, vecs, 1, differences>(panel, dim, key + j * key_stride, key_stride, add, factor, out + j * out_stride,
                                        out_stride);
}

// out[key][lane] = <keys[key], panel row lane> for all keys, or their squared distance.
template <class A, bool differences = false>
TOKENPRUNE_INLINE void panel_dots(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys,
                                  A* out) {
  constexpr int lanes = kPanelLanes<A>;
  if (dim == 0) std::memset(out, 0, n_keys * lanes * sizeof(A));
  for (int64_t start = 0; start < dim; start += kBlock) {
    const int64_t length = dim - start < kBlock ? dim - start : kBlock;
    panel_block<A, 2, differences>(panel + start * lanes, length, keys + start, key_stride, n_keys, start > 0, A(1),
                                   out, lanes);
  }
}

// out[r * out_stride + lane] (+)= <row r of panel `rows`, row `lane` of panel `others`> over one block of dimensions.
template <class A>
TOKENPRUNE_INLINE void panel_products(const A* rows, const A* others, int64_t dim, bool add, A* out,
                                      int64_t out_stride) {
  constexpr int lanes = kPanelLanes<A>, tile = kTileKeys < 8 || lanes < 8 ? 4 : 8;
  for (int64_t r = 0; r < lanes; r += tile)
    panel_tile<A, 2, tile, false, lanes>(others, dim, rows + r, 1, add, A(1), out + r * out_stride, out_stride);
}

// squares[lane] = <panel row lane, itself>, in the order of panel_dots: equal rows have a distance of exactly 0.
template <class A>
TOKENPRUNE_INLINE void panel_squares(const A* panel, int64_t dim, A* squares) {
  constexpr int width = kWidth<A>;
  Vec<A> total[2] = {};
  for (int64_t start = 0; start < dim; start += kBlock) {
    const int64_t end = dim - start < kBlock ? dim : start + kBlock;
    Vec<A> sum[2] = {};
    for (int64_t d = start; d < end; ++d)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vec<A> x = load(panel + (d * 2 + v) * width);
        sum[v] += x * x;
      }
    for (int v = 0; v < 2; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < 2; ++v) store(squares + v * width, total[v]);
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

template <class A>
TOKENPRUNE_INLINE A norm_of_squares(A squares) {
  const A root = sizeof(A) == 4 ? A(__builtin_sqrtf(float(squares))) : A(__builtin_sqrt(double(squares)));
  return root < A(kNormFloor) ? A(kNormFloor) : root;
}

// max(||row||, kNormFloor) of a row of any type.
template <class T, class A = std::conditional_t<std::is_same_v<T, double>, double, float>>
TOKENPRUNE_INLINE A norm_of(const T* row, int64_t dim) {
  constexpr int width = kWidth<A>;
  Vec<A> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * width <= dim; d += 4 * width)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const Vec<A> x = load_wide(row + d + u * width);
      sum[u] += x * x;
    }
  for (; d + width <= dim; d += width) {
    const Vec<A> x = load_wide(row + d);
    sum[0] += x * x;
  }
  A tail = 0;
  for (; d < dim; ++d) tail += to_float(row[d]) * to_float(row[d]);
  return norm_of_squares(horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail);
}

}  // namespace tokenprune::TOKENPRUNE_SIMD
