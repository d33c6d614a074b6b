// Attention of a few query rows: logits[lane][key]. One pass over the keys, read once for all rows. See attention.h.
#pragma once

#include "cpu/simd/attention.h"
#include "cpu/simd/dot.h"

namespace tokenprune::TOKENPRUNE_SIMD {

#if defined(TOKENPRUNE_SIMD_AVX512)
constexpr int kFewRows = 3;  // 3 x 4 accumulators
#else
constexpr int kFewRows = 2;
#endif

// The sums of four vectors, each added up in the order of horizontal_sum.
template <class A>
TOKENPRUNE_INLINE void store_four_sums(const Vec<A> (&v)[4], A* out) {
  if constexpr (kWidth<A> < 4) {
    for (int j = 0; j < 4; ++j) out[j] = horizontal_sum<A>(v[j]);
  } else {
    using Quad = typename VectorOfBytes<A, 4 * sizeof(A)>::type;
    Quad q[4];
    for (int j = 0; j < 4; ++j) q[j] = fold<A, 4 * sizeof(A)>(v[j]);
    const Quad first = shuffle<0, 4, 1, 5>(q[0], q[1]) + shuffle<2, 6, 3, 7>(q[0], q[1]);
    const Quad second = shuffle<0, 4, 1, 5>(q[2], q[3]) + shuffle<2, 6, 3, 7>(q[2], q[3]);
    const Quad sums = shuffle<0, 1, 4, 5>(first, second) + shuffle<2, 3, 6, 7>(first, second);
    std::memcpy(out, &sums, sizeof sums);
  }
}

// out[row * out_stride + j] = <query row, key j> for `keys` keys; the query rows are padded to whole vectors with
// zeros.
template <class T, int rows, int keys, class A = Wide<T>>
TOKENPRUNE_INLINE void few_tile(const A* query, int64_t query_stride, int64_t dim, const T* key, int64_t key_stride,
                                A* out, int64_t out_stride) {
  constexpr int width = kWidth<A>;
  Vec<A> sum[rows][keys];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < keys; ++j) sum[r][j] = Vec<A>{};
  const auto step = [&](int64_t d, const Vec<A>(&x)[keys]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<A> q = load(query + r * query_stride + d);
#pragma GCC unroll 8
      for (int j = 0; j < keys; ++j) sum[r][j] += q * x[j];
    }
  };
  Vec<A> x[keys];
  int64_t d = 0;
  for (; d + width <= dim; d += width) {
#pragma GCC unroll 8
    for (int j = 0; j < keys; ++j) x[j] = load_wide(key + j * key_stride + d);
    step(d, x);
  }
  if (d < dim) {
#pragma GCC unroll 8
    for (int j = 0; j < keys; ++j) {
      A rest[width] = {};
      widen(key + j * key_stride + d, dim - d, rest);
      x[j] = load(rest);
    }
    step(d, x);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    if constexpr (keys == 4)
      store_four_sums<A>(sum[r], out + r * out_stride);
    else
      for (int j = 0; j < keys; ++j) out[r * out_stride + j] = horizontal_sum<A>(sum[r][j]);
  }
}

template <class T, int rows, class A = Wide<T>>
void few_dots(const A* query, int64_t query_stride, const AttentionHead<T>& head, int64_t begin, int64_t end, A* out,
              int64_t out_stride) {
  int64_t j = begin;
  for (; j + 4 <= end; j += 4)
    few_tile<T, rows, 4>(query, query_stride, head.dim, head.key + j * head.key_stride, head.key_stride, out + j,
                         out_stride);
  for (; j < end; ++j)
    few_tile<T, rows, 1>(query, query_stride, head.dim, head.key + j * head.key_stride, head.key_stride, out + j,
                         out_stride);
}

template <class T, class A = Wide<T>>
void few_logits(const AttentionHead<T>& head, const AttentionSpace<A>& space) {
  const int64_t total = head.group * head.rows, width = kWidth<A>, stride = space.lanes;
  const int64_t padded = (head.dim + width - 1) / width * width;
  const A hidden = -__builtin_inff();
  for (int64_t l = 0; l < total; ++l) {
    const T* from = head.query + l / head.rows * head.query_head_stride + l % head.rows * head.query_row_stride;
    A* row = space.query + l * padded;
    widen(from, head.dim, row);
    for (int64_t d = head.dim; d < padded; ++d) row[d] = 0;
    if (head.key_norms == nullptr) continue;
    const A norm = norm_of(from, head.dim);
    for (int64_t d = 0; d < head.dim; ++d) row[d] /= norm;
  }
  // A chunk of keys is multiplied with all rows while it is in cache.
  for (int64_t begin = 0; begin < head.keys; begin += kAttentionChunk) {
    const int64_t end = head.keys - begin < kAttentionChunk ? head.keys : begin + kAttentionChunk;
    for (int64_t l = 0; l < total;) {
      const A* rows = space.query + l * padded;
      A* out = space.logits + l * stride;
      if (kFewRows == 3 && total - l >= 3) {
        few_dots<T, 3>(rows, padded, head, begin, end, out, stride);
        l += 3;
      } else if (total - l >= 2) {
        few_dots<T, 2>(rows, padded, head, begin, end, out, stride);
        l += 2;
      } else {
        few_dots<T, 1>(rows, padded, head, begin, end, out, stride);
        l += 1;
      }
    }
  }
  for (int64_t l = 0; l < total; ++l) {
    A* s = space.logits + l * stride;
    if (head.key_norms) {
      A nothing = 0;  // or NaN: the row's product with the unit vector of a key whose squares overflow
      for (int64_t d = 0; d < head.dim; ++d) nothing += space.query[l * padded + d] * 0;
      for (int64_t j = 0; j < head.keys; ++j)
        s[j] = __builtin_isinf(head.key_norms[j]) ? nothing : s[j] / head.key_norms[j] * head.scale;
    } else {
      for (int64_t j = 0; j < head.keys; ++j) s[j] *= head.scale;
    }
    if (head.key_mask)
      for (int64_t j = 0; j < head.keys; ++j) s[j] = head.key_mask[j] ? s[j] : hidden;
    int64_t seen = head.keys;
    if (head.positions && head.positions[l % head.rows] + 1 < seen) seen = head.positions[l % head.rows] + 1;
    for (int64_t j = seen < 0 ? 0 : seen; j < stride; ++j) s[j] = hidden;
  }
}

template <class T, class A = Wide<T>>
void softmax_few(const AttentionHead<T>& head, const AttentionSpace<A>& space) {
  const int64_t total = head.group * head.rows, width = kWidth<A>, stride = space.lanes;
  const Vec<A> zero = {}, hidden = splat(A(-__builtin_inff())), tiny = splat(kExpLowest<A>);
  few_logits<T>(head, space);
  for (int64_t l = 0; l < total; ++l) {
    A* s = space.logits + l * stride;
    const int64_t at = l / head.rows * head.stat_stride + l % head.rows;
    A lse, entropy = 0;
    if (head.lse_in) {
      lse = head.lse_in[at];
    } else {
      Vec<A> top = hidden;
      for (int64_t j = 0; j < stride; j += width) top = vec_max<A>(top, load(s + j));
      lse = top[0];
      for (int64_t i = 1; i < width; ++i) lse = larger(lse, A(top[i]));
      if (lse < A(__builtin_inff())) {
        const Vec<A> peak = splat(lse > A(-__builtin_inff()) ? lse : A(0));
        Vec<A> sum = {}, product = {};
        for (int64_t j = 0; j < stride; j += width) {
          Vec<A> t = load(s + j) - peak;
          t = t > tiny ? t : tiny;
          const Vec<A> e = vec_exp_normal(t);
          store(s + j, e);
          sum += e;
          product += e * t;
        }
        const A mass = horizontal_sum<A>(sum), logarithm = log_of(mass);
        space.factors[l] = mass > 0 ? 1 / mass : A(0);
        head.lse[at] = mass > 0 ? peak[0] + logarithm : lse;
        head.entropy[at] = mass > 0 ? logarithm - horizontal_sum<A>(product) / mass : A(0);
        continue;
      }
      entropy = __builtin_nanf("");  // NaN or +inf among the logits
      head.lse[at] = lse;
      head.entropy[at] = entropy;
    }
    const Vec<A> given = splat(lse);
    for (int64_t j = 0; j < stride; j += width) {
      const Vec<A> x = load(s + j), e = vec_exp(x - given);
      store(s + j, ((x == hidden) | (given == hidden)) ? zero : e);
    }
    space.factors[l] = 1;
  }
}

template <class A>
void gather_few(const AttentionGather<A>& gather, const AttentionSpace<A>& space) {
  for (int64_t row = 0; row < gather.rows; ++row)
    for (int64_t h = gather.head_begin; h < gather.head_end; ++h) {
      const int64_t lane = h * gather.rows + row;
      const A* from = space.logits + lane * space.lanes;
      A* into = gather.into + row * gather.stride;
      const bool first = gather.first && h == gather.head_begin;
      for (int64_t j = 0; j < gather.stride; j += kWidth<A>) {
        const Vec<A> p = load(from + j) * space.factors[lane];
        const Vec<A> old = first ? p : load(into + j);
        store(into + j, first ? p : gather.max ? vec_max<A>(old, p) : old + p);
      }
    }
}

template <class A>
void reduce_few(const AttentionReduce<A>& reduce, int64_t key_begin, int64_t key_end) {
  for (int64_t j = key_begin; j < key_end; j += kWidth<A>) {
    Vec<A> values[4] = {};  // sum, sum, max, last: probabilities are not negative, and no valid row gives 0
    for (int64_t row = 0; row < reduce.rows; ++row) {
      if (reduce.row_valid[row] == 0) continue;
      const A* from = reduce.from + row * reduce.stride + j;
      Vec<A> p = load(from);
      for (int64_t part = 1; part < reduce.parts; ++part) {
        const Vec<A> more = load(from + part * reduce.part_stride);
        p = reduce.max_heads ? vec_max<A>(p, more) : p + more;
      }
      p = p / reduce.head_divisor;
      values[0] += p;
      values[2] = vec_max<A>(values[2], p);
      if (row == reduce.last) values[3] = p;
    }
    values[1] = values[0];
    const int64_t n = key_end - j < kWidth<A> ? key_end - j : kWidth<A>;
    for (int64_t k = 0; k < reduce.n_kinds; ++k) {
      A* out = reduce.out + k * reduce.kind_stride + j;
      for (int64_t i = 0; i < n; ++i) {
        const A value = values[reduce.kinds[k]][i];
        out[i] = reduce.first ? value : reduce.kinds[k] == 2 ? larger(out[i], value) : out[i] + value;
      }
    }
  }
}

}  // namespace tokenprune::TOKENPRUNE_SIMD
