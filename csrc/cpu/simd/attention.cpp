// Attention with the query rows in vector lanes: logits[key][lane]. See attention.h.
#include "cpu/simd/attention.h"

#include "cpu/simd/attention_few.h"
#include "cpu/simd/dot.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

template <class A>
int64_t panel_vecs(int64_t lane, int64_t lanes) {  // panels are two vectors wide, the last one may be one vector
  return lanes - lane > kWidth<A> ? 2 : 1;
}

// Infinite where squares overflow, NaN where an element is infinite.
template <class T, class A = Wide<T>>
void norms(const T* rows, int64_t row_stride, int64_t n, int64_t dim, A* out) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = rows + i * row_stride;
    out[i] = norm_of(row, dim);
    for (int64_t d = 0; __builtin_isinf(out[i]) && d < dim; ++d)
      if (const A x = to_float(row[d]); __builtin_isinf(x)) out[i] = x - x;
  }
}

// Rows to panels, in the arithmetic type; missing lanes are zero.
template <class T, class A = Wide<T>>
void pack_queries(const AttentionHead<T>& head, const AttentionSpace<A>& space) {
  const int64_t total = head.group * head.rows, dim = head.dim, block = dim < kBlock ? dim : kBlock;
  for (int64_t lane = 0; lane < space.lanes; lane += 4) {
    const int64_t first = lane - lane % kPanelLanes<A>;
    const int64_t width = panel_vecs<A>(first, space.lanes) * kWidth<A>;
    A* to = space.query + first * dim + (lane - first);
    const T* from[4];
    A norm[4];
    for (int r = 0; r < 4; ++r) {
      const int64_t l = lane + r;
      from[r] = l < total ? head.query + l / head.rows * head.query_head_stride + l % head.rows * head.query_row_stride
                          : nullptr;
      norm[r] = head.key_norms && from[r] ? norm_of(from[r], dim) : A(1);
    }
    for (int64_t start = 0; start < dim; start += block) {
      const int64_t length = dim - start < block ? dim - start : block;
      const A* rows[4];
      for (int r = 0; r < 4; ++r) {
        A* wide = space.key + r * block;
        rows[r] = wide;
        if (from[r] == nullptr) {
          for (int64_t d = 0; d < length; ++d) wide[d] = 0;
          continue;
        }
        if constexpr (std::is_same_v<T, A>) {
          if (head.key_norms == nullptr) {
            rows[r] = from[r] + start;
            continue;
          }
        }
        widen(from[r] + start, length, wide);
        for (int64_t d = 0; head.key_norms && d < length; ++d) wide[d] /= norm[r];
      }
      transpose_four<A>(rows, length, to + start * width, width);
    }
  }
}

// logits[key][lane] of the keys [begin, end) of the head, written to `out`; -inf where a key is not visible.
template <class T, class A = Wide<T>>
void chunk_logits(const AttentionHead<T>& head, const AttentionSpace<A>& space, int64_t begin, int64_t end, A* out) {
  const int64_t lanes = space.lanes, n = end - begin, total = head.group * head.rows;
  const A hidden = -__builtin_inff();
  bool any = head.key_mask == nullptr;
  for (int64_t j = begin; !any && j < end; ++j) any = head.key_mask[j];
  if (head.positions) {
    bool reached = false;
    for (int64_t r = 0; r < head.rows; ++r) reached |= head.positions[r] >= begin;
    any = any && reached;
  }
  if (!any) {
    for (int64_t i = 0; i < n * lanes; ++i) out[i] = hidden;
    return;
  }
  // The unit vector of such a key is 0, but its dot products may be infinite or inf - inf.
  const auto vanishes = [&](int64_t j) { return head.key_norms && __builtin_isinf(head.key_norms[begin + j]); };
  bool any_vanishes = false;
  for (int64_t j = 0; j < n; ++j) any_vanishes |= vanishes(j);
  for (int64_t start = 0; start < head.dim; start += kBlock) {
    const int64_t length = head.dim - start < kBlock ? head.dim - start : kBlock;
    const bool final = start + length == head.dim;
    const A factor = final && !head.key_norms ? head.scale : A(1);
    const A* keys = space.key;
    int64_t stride = length;
    bool copy = true;
    if constexpr (std::is_same_v<T, A>) {
      // Rows that lie far apart, such as 4096 elements, fall into the same few sets of the first-level cache.
      copy = any_vanishes || head.key_stride > kBlock;
      if (!copy) keys = head.key + begin * head.key_stride + start;
      if (!copy) stride = head.key_stride;
    }
    for (int64_t j = 0; copy && j < n; ++j) {
      A* wide = space.key + j * length;
      widen(head.key + (begin + j) * head.key_stride + start, length, wide);
      for (int64_t d = 0; vanishes(j) && d < length; ++d) wide[d] = 0;
    }
    for (int64_t lane = 0; lane < lanes; lane += kPanelLanes<A>) {
      const int64_t vecs = panel_vecs<A>(lane, lanes);
      const A* panel = space.query + lane * head.dim + start * vecs * kWidth<A>;
      if (vecs == 2)
        panel_block<A, 2>(panel, length, keys, stride, n, start > 0, factor, out + lane, lanes);
      else
        panel_block<A, 1>(panel, length, keys, stride, n, start > 0, factor, out + lane, lanes);
    }
  }
  if (head.key_norms)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t v = 0; v < lanes; v += kWidth<A>) {
        A* s = out + j * lanes + v;
        store(s, load(s) / head.key_norms[begin + j] * head.scale);
      }
  if (head.key_mask)
    for (int64_t j = 0; j < n; ++j)
      if (!head.key_mask[begin + j])
        for (int64_t l = 0; l < lanes; ++l) out[j * lanes + l] = hidden;
  if (head.positions)
    for (int64_t l = 0; l < total; ++l) {
      const int64_t seen = head.positions[l % head.rows] + 1 - begin;  // keys of this chunk that the row sees
      for (int64_t j = seen < 0 ? 0 : seen; j < n; ++j) out[j * lanes + l] = hidden;
    }
}

// exp(s - max) of one chunk in place, with the chunk's maximum, sum of e and sum of e * (s - max) of every lane.
template <class A>
void chunk_softmax(A* logits, int64_t n, int64_t lanes, A* top, A* sum, A* weighted) {
  const Vec<A> lowest = splat(sizeof(A) == 4 ? A(-__FLT_MAX__) : A(-__DBL_MAX__)), tiny = splat(kExpLowest<A>);
  for (int64_t v = 0; v < lanes; v += kWidth<A>) {
    A* column = logits + v;
    Vec<A> m[4] = {lowest, lowest, lowest, lowest};  // finite, so that a chunk of -inf gives e = 0
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const Vec<A> s = load(column + (j + u) * lanes);
        m[u] = m[u] > s ? m[u] : s;
      }
    for (; j < n; ++j) {
      const Vec<A> s = load(column + j * lanes);
      m[0] = m[0] > s ? m[0] : s;
    }
    m[0] = m[0] > m[1] ? m[0] : m[1];
    m[2] = m[2] > m[3] ? m[2] : m[3];
    const Vec<A> peak = m[0] > m[2] ? m[0] : m[2];
    Vec<A> s0 = {}, s1 = {}, w0 = {}, w1 = {};
    const auto step = [&](int64_t key, Vec<A>& total, Vec<A>& product) __attribute__((always_inline)) {
      Vec<A> t = load(column + key * lanes) - peak;
      t = tiny > t ? tiny : t;  // NaN stays, and poisons the product: see `special`
      const Vec<A> e = vec_exp_normal(t);
      store(column + key * lanes, e);
      total += e;
      product += e * t;
    };
    for (j = 0; j + 2 <= n; j += 2) {
      step(j, s0, w0);
      step(j + 1, s1, w1);
    }
    if (j < n) step(j, s0, w0);
    store(top + v, peak);
    store(sum + v, s0 + s1);
    store(weighted + v, w0 + w1);
  }
}

// exp(s - lse) of one chunk in place, for a lse that may be anything: given by the caller, NaN or infinite.
template <class A>
void chunk_probabilities(A* logits, int64_t n, int64_t lanes, const A* lse) {
  const Vec<A> zero = {}, hidden = splat(A(-__builtin_inff()));
  for (int64_t v = 0; v < lanes; v += kWidth<A>) {
    const Vec<A> given = load(lse + v);
    for (int64_t j = 0; j < n; ++j) {
      A* at = logits + j * lanes + v;
      const Vec<A> s = load(at);
      const Vec<A> e = vec_exp(s - given);
      store(at, ((s == hidden) | (given == hidden)) ? zero : e);
    }
  }
}

// The chunks' statistics of every lane become its lse and entropy, and `top` the factors that make probabilities of
// the chunks' exponentials. Returns true when a lane holds NaN or +inf logits, whose statistics need another pass.
template <class T, class A = Wide<T>>
bool finish(const AttentionHead<T>& head, A* top, const A* sum, const A* weighted, int64_t chunks, int64_t lanes) {
  bool special = false;
  for (int64_t v = 0; v < lanes; v += kWidth<A>) {
    Vec<A> peak = load(top + v);
    for (int64_t c = 1; c < chunks; ++c) {
      const Vec<A> other = load(top + c * lanes + v);
      peak = peak > other ? peak : other;
    }
    Vec<A> total = {}, product = {};
    for (int64_t c = 0; c < chunks; ++c) {
      A* at = top + c * lanes + v;
      Vec<A> shift = load(at) - peak;
      shift = shift > kExpLowest<A> ? shift : splat(kExpLowest<A>);
      const Vec<A> ratio = vec_exp_normal(shift), s = load(sum + c * lanes + v);
      total += s * ratio;
      product += (load(weighted + c * lanes + v) + s * shift) * ratio;
      store(at, ratio);
    }
    A inverse[kWidth<A>];
    for (int64_t l = 0; l < kWidth<A>; ++l) {
      const A t = total[l], p = product[l];
      inverse[l] = t > 0 ? 1 / t : A(0);
      if (v + l >= head.group * head.rows) continue;
      const A logarithm = log_of(t);
      const int64_t at = (v + l) / head.rows * head.stat_stride + (v + l) % head.rows;
      head.lse[at] = t > 0 ? peak[l] + logarithm : A(-__builtin_inff());
      head.entropy[at] = t > 0 ? logarithm - p / t : A(0);
      special |= p != p;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      A* at = top + c * lanes + v;
      store(at, load(at) * load(inverse));
    }
  }
  return special;
}

// The lse of lanes with NaN or +inf logits, as torch.logsumexp has it: NaN, or +inf without any NaN.
template <class T, class A = Wide<T>>
void finish_special(const AttentionHead<T>& head, const AttentionSpace<A>& space, A* top) {
  const int64_t total = head.group * head.rows;
  for (int64_t l = 0; l < total; ++l) top[l] = -__builtin_inff();
  for (int64_t begin = 0; begin < head.keys; begin += kAttentionChunk) {
    const int64_t end = head.keys - begin < kAttentionChunk ? head.keys : begin + kAttentionChunk;
    chunk_logits<T>(head, space, begin, end, space.logits);
    for (int64_t j = 0; j < end - begin; ++j)
      for (int64_t l = 0; l < total; ++l) {
        const A s = space.logits[j * space.lanes + l];
        if (!(top[l] > s) && top[l] == top[l]) top[l] = s;
      }
  }
  for (int64_t l = 0; l < total; ++l) {
    if (top[l] < A(__builtin_inff())) continue;
    const int64_t at = l / head.rows * head.stat_stride + l % head.rows;
    head.lse[at] = top[l];
    head.entropy[at] = A(__builtin_nanf(""));
  }
}

template <class T, class A = Wide<T>>
void softmax_lanes(const AttentionHead<T>& head, const AttentionSpace<A>& space) {
  const int64_t lanes = space.lanes, chunks = (head.keys + kAttentionChunk - 1) / kAttentionChunk;
  A *top = space.factors, *sum = space.sums, *weighted = sum + chunks * lanes;
  pack_queries<T>(head, space);
  const A* lse = head.lse_in;
  if (lse == nullptr) {
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * kAttentionChunk;
      const int64_t end = head.keys - begin < kAttentionChunk ? head.keys : begin + kAttentionChunk;
      A* out = space.logits + (space.keep ? begin * lanes : 0);
      chunk_logits<T>(head, space, begin, end, out);
      chunk_softmax<A>(out, end - begin, lanes, top + c * lanes, sum + c * lanes, weighted + c * lanes);
    }
    if (!finish<T>(head, top, sum, weighted, chunks, lanes)) return;
    finish_special<T>(head, space, sum);
    if (!space.keep) return;
    lse = head.lse;
  }
  for (int64_t l = 0; l < lanes; ++l)
    sum[l] = l < head.group * head.rows ? lse[l / head.rows * head.stat_stride + l % head.rows] : A(0);
  for (int64_t begin = 0; begin < head.keys; begin += kAttentionChunk) {
    const int64_t end = head.keys - begin < kAttentionChunk ? head.keys : begin + kAttentionChunk;
    chunk_logits<T>(head, space, begin, end, space.logits + begin * lanes);
    chunk_probabilities<A>(space.logits + begin * lanes, end - begin, lanes, sum);
  }
  for (int64_t i = 0; i < chunks * lanes; ++i) top[i] = 1;
}

// A row of the gathered array ends in padding, which takes whatever the next head's lanes hold and is never read.
template <class A, bool max>
void gather_lanes_as(const AttentionGather<A>& gather, const AttentionSpace<A>& space) {
  for (int64_t j = 0; j < gather.keys; ++j) {
    const A* factors = space.factors + j / kAttentionChunk * space.lanes;
    const A* from = space.logits + j * space.lanes;
    A* into = gather.into + j * gather.stride;
    for (int64_t v = 0; v < gather.stride; v += kWidth<A>) {
      Vec<A> p = {};  // probabilities are not negative: also the start of a maximum
      if (!gather.first) p = load(into + v);
      for (int64_t h = gather.head_begin; h < gather.head_end; ++h) {
        const Vec<A> more = load(from + h * gather.rows + v) * load(factors + h * gather.rows + v);
        p = max ? vec_max<A>(p, more) : p + more;
      }
      store(into + v, p);
    }
  }
}

template <class A>
void gather_lanes(const AttentionGather<A>& gather, const AttentionSpace<A>& space) {
  gather.max ? gather_lanes_as<A, true>(gather, space) : gather_lanes_as<A, false>(gather, space);
}

template <class A>
void reduce_lanes(const AttentionReduce<A>& reduce, int64_t key_begin, int64_t key_end) {
  const Vec<A> zero = {};
  for (int64_t j = key_begin; j < key_end; ++j) {
    Vec<A> sum = {}, top = {};  // probabilities are not negative, and no valid row gives 0
    A last = 0;
    for (int64_t v = 0; v < reduce.stride; v += kWidth<A>) {
      const A* from = reduce.from + j * reduce.stride + v;
      Vec<A> p = load(from);
      for (int64_t part = 1; part < reduce.parts; ++part) {
        const Vec<A> more = load(from + part * reduce.part_stride);
        p = reduce.max_heads ? vec_max<A>(p, more) : p + more;
      }
      p = p / reduce.head_divisor;
      if (reduce.last >= v && reduce.last < v + kWidth<A>) last = p[reduce.last - v];
      p = load(reduce.row_valid + v) != zero ? p : zero;
      sum += p;
      top = vec_max<A>(top, p);
    }
    A values[4] = {horizontal_sum<A>(sum), 0, top[0], last};
    values[1] = values[0];
    for (int64_t l = 1; l < kWidth<A>; ++l) values[2] = larger(values[2], A(top[l]));
    for (int64_t k = 0; k < reduce.n_kinds; ++k) {
      A* out = reduce.out + k * reduce.kind_stride + j;
      const A value = values[reduce.kinds[k]];
      *out = reduce.first ? value : reduce.kinds[k] == 2 ? larger(*out, value) : *out + value;
    }
  }
}

template <class T, class A = Wide<T>>
constexpr AttentionKernels<T> table() {
  return {kWidth<A> < 4 ? 4 : kWidth<A>,
          norms<T>,
          softmax_lanes<T>,
          gather_lanes<A>,
          reduce_lanes<A>,
          softmax_few<T>,
          gather_few<A>,
          reduce_few<A>};
}

}  // namespace

extern const AttentionKernels<float> attention_f32;
extern const AttentionKernels<double> attention_f64;
extern const AttentionKernels<Half> attention_f16;
extern const AttentionKernels<BFloat16> attention_bf16;
const AttentionKernels<float> attention_f32 = table<float>();
const AttentionKernels<double> attention_f64 = table<double>();
const AttentionKernels<Half> attention_f16 = table<Half>();
const AttentionKernels<BFloat16> attention_bf16 = table<BFloat16>();

}  // namespace tokenprune::TOKENPRUNE_SIMD
