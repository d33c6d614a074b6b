// CPU kernel of spatial_semantic_nms (AdaptPrune, arXiv 2503.08019).
//
// The published loop compares every pick with every token. Here a token is compared with the picks only when it is
// about to be picked itself. That is exact: suppression never raises a positive score (soft), or any score (hard), so a
// score to which the latest picks are not yet applied is an upper bound of the true one. The best bound is settled,
// that is brought up to date, and either stays best and is picked, or falls back. Every pick is applied to a token at
// most once and in order, so each score is the same product that the plain loop computes.

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/simd/similarity.h"
#include "dispatch.h"
#include "op.h"
#include "parallel.h"
#include "tokenprune/math.h"
#include "tokenprune/order.h"

namespace tokenprune {

namespace {

constexpr int64_t kAxes = 2;  // positions are those on the grid of patches: two coordinates

template <class A>
struct Suppression {
  A radius, two_spatial2, two_semantic2, threshold;
  bool hard;
};

// One sample. F is the arithmetic type of its features, A that of scores and distances.
template <class T, class A>
struct Sample {
  using F = Wide<T>;
  using Key = decltype(order_key(A()));

  const T* features;
  int64_t row_stride, dim, n;
  const int64_t* group;  // null: all tokens are of one group
  int64_t group_stride;
  const A* coordinates;   // [n, kAxes]
  A* score;               // [n], as of the first `seen` picks
  int64_t* seen;          // [n]
  F* norm;                // [n], negative: not computed yet
  Key* tree;              // [2 * leaves], a tournament: tree[i] = max(tree[2i], tree[2i + 1])
  int64_t leaves;         // a power of two >= n
  const int64_t* picked;  // [k], in order
};

template <class S, class Key>
void set_key(S& s, int64_t j, Key key) {
  int64_t node = s.leaves + j;
  s.tree[node] = key;
  while (node >>= 1) {
    const Key best = s.tree[2 * node] > s.tree[2 * node + 1] ? s.tree[2 * node] : s.tree[2 * node + 1];
    if (s.tree[node] == best) return;
    s.tree[node] = best;
  }
}

// The first of the best candidates.
template <class S>
int64_t best_candidate(const S& s) {
  int64_t node = 1;
  while (node < s.leaves) node = 2 * node + (s.tree[2 * node] != s.tree[node]);
  return node - s.leaves;
}

// ||f_j||, at least kNormFloor. Of a row too large for its squares it is inf (its unit vector is 0), and NaN if the
// unit vector contains one.
template <class T, class A>
Wide<T> norm_of(Sample<T, A>& s, int64_t j) {
  using F = Wide<T>;
  if (s.norm[j] < 0) {
    const T* row = s.features + j * s.row_stride;
    F norm = norm_from_squares(similarity_kernels<T>().dot(row, row, s.dim));
    if (std::isinf(norm))
      for (int64_t d = 0; d < s.dim; ++d)
        if (std::isinf(to_float(row[d]))) norm = std::numeric_limits<F>::quiet_NaN();
    s.norm[j] = norm;
  }
  return s.norm[j];
}

// The weight w with which pick m suppresses its neighbour j. The spatial factor bounds it from above; where even that
// bound has no effect, the long dot product is left out and the result is any weight that has none.
template <class T, class A>
A weight(Sample<T, A>& s, int64_t j, int64_t m, A squared_distance, const Suppression<A>& by) {
  using F = Wide<T>;
  const A bound = suppression(A(1), squared_distance, by.two_spatial2, by.two_semantic2);
  if (by.hard && bound < by.threshold) return bound;
  const F norm_j = norm_of(s, j), norm_m = norm_of(s, m);
  if (norm_j != norm_j || norm_m != norm_m) return std::numeric_limits<A>::quiet_NaN();
  if (!by.hard && (1 - bound == 1 || (s.score[j] == 0 && bound == bound))) return 0;
  if (std::isinf(by.two_semantic2)) return bound;
  F cosine = 0;
  if (!std::isinf(norm_j) && !std::isinf(norm_m))
    cosine = similarity_kernels<T>().dot(s.features + j * s.row_stride, s.features + m * s.row_stride, s.dim) / norm_j /
             norm_m;
  return suppression(A(cosine), squared_distance, by.two_spatial2, by.two_semantic2);
}

template <class A>
A squared_distance_of(const A* a, const A* b) {
  const A dx = a[0] - b[0], dy = a[1] - b[1];
  return dx * dx + dy * dy;
}

// Applies to token j the suppression of the picks since its last update.
template <class T, class A>
void settle(Sample<T, A>& s, int64_t j, int64_t picks, const Suppression<A>& by) {
  const A before = s.score[j];
  for (; s.seen[j] < picks; ++s.seen[j]) {
    const int64_t m = s.picked[s.seen[j]];
    if (s.group != nullptr && s.group[j * s.group_stride] != s.group[m * s.group_stride]) continue;
    const A squared_distance = squared_distance_of(s.coordinates + j * kAxes, s.coordinates + m * kAxes);
    if (!(std::sqrt(squared_distance) <= by.radius)) continue;
    const A w = weight(s, j, m, squared_distance, by);
    if (!by.hard) {
      s.score[j] *= 1 - w;
    } else if (w >= by.threshold) {
      set_key(s, j, typename Sample<T, A>::Key(kNoKey));
      return;
    }
  }
  if (!(s.score[j] == before)) set_key(s, j, order_key(s.score[j]));
}

// The next pick, or -1.
template <class T, class A>
int64_t next_pick(Sample<T, A>& s, int64_t picks, const Suppression<A>& by) {
  using Key = typename Sample<T, A>::Key;
  for (;;) {
    if (!by.hard && s.tree[1] != kNoKey && s.tree[1] <= order_key(A(0))) {
      // Suppression raises negative scores, so the bound is lost: from here on all tokens are settled at every pick.
      for (int64_t j = 0; j < s.n; ++j)
        if (s.tree[s.leaves + j] != Key(kNoKey)) settle(s, j, picks, by);
      return best_candidate(s);
    }
    if (s.tree[1] == kNoKey) return -1;
    const int64_t best = best_candidate(s);
    if (s.seen[best] == picks) return best;
    settle(s, best, picks, by);
  }
}

// [B, N, ...] in any layout and floating type as contiguous A.
template <class A>
std::vector<A> widened(const Tensor& t) {
  const int64_t batch = t.size(0), n = t.size(1), last = t.dim() == 3 ? t.size(2) : 1;
  const int64_t by_batch = t.stride(0), by_token = t.stride(1), by_last = t.dim() == 3 ? t.stride(2) : 0;
  std::vector<A> wide(batch * n * last);
  dispatch_floating(t.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(t.const_data_ptr());
    A* to = wide.data();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < last; ++d) *to++ = A(to_float(from[b * by_batch + i * by_token + d * by_last]));
  });
  return wide;
}

struct Outputs {
  int64_t* indices;
  float* scores_f32;  // one of the two is null
  double* scores_f64;
  int64_t* counts;
  int64_t k;
};

template <class T, class A>
void run(const Tensor& scores, const Tensor& features, const Tensor& positions, const OptionalTensor& groups,
         const OptionalTensor& mask, const Suppression<A>& by, const Outputs& out) {
  using Key = typename Sample<T, A>::Key;
  const int64_t batch = scores.size(0), n = scores.size(1), dim = features.size(2), steps = std::min(out.k, n);
  int64_t leaves = 1;
  while (leaves < n) leaves *= 2;
  std::vector<A> score = widened<A>(scores);
  const std::vector<A> coordinates = widened<A>(positions);
  std::vector<Wide<T>> norm(batch * n, -1);
  std::vector<int64_t> seen(batch * n, 0);
  std::vector<Key> tree(batch * 2 * leaves, kNoKey);
  const T* rows = static_cast<const T*>(features.const_data_ptr());
  const uint8_t* allowed = mask_bytes(mask);
  const int64_t* group = groups ? groups->const_data_ptr<int64_t>() : nullptr;

  const auto sample = [&](int64_t b) {
    Sample<T, A> s{rows + b * features.stride(0),
                   features.stride(1),
                   dim,
                   n,
                   group ? group + b * groups->stride(0) : nullptr,
                   group ? groups->stride(1) : 0,
                   coordinates.data() + b * n * kAxes,
                   score.data() + b * n,
                   seen.data() + b * n,
                   norm.data() + b * n,
                   tree.data() + b * 2 * leaves,
                   leaves,
                   out.indices + b * out.k};
    for (int64_t j = 0; j < n; ++j)
      if (!allowed || allowed[b * mask->stride(0) + j * mask->stride(1)]) s.tree[leaves + j] = order_key(s.score[j]);
    for (int64_t node = leaves - 1; node > 0; --node) s.tree[node] = std::max(s.tree[2 * node], s.tree[2 * node + 1]);
    int64_t picks = 0;
    for (; picks < steps; ++picks) {
      const int64_t pick = next_pick(s, picks, by);
      if (pick < 0) break;
      out.indices[b * out.k + picks] = pick;
      if (out.scores_f64) out.scores_f64[b * out.k + picks] = double(s.score[pick]);
      if (out.scores_f32) out.scores_f32[b * out.k + picks] = float(s.score[pick]);
      set_key(s, pick, Key(kNoKey));
    }
    out.counts[b] = picks;
    for (; picks < out.k; ++picks) {
      out.indices[b * out.k + picks] = -1;
      if (out.scores_f64) out.scores_f64[b * out.k + picks] = 0;
      if (out.scores_f32) out.scores_f32[b * out.k + picks] = 0;
    }
  };
  parallel_for(batch, 1 + 32768 / (n + steps * (dim + 1) + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) sample(b);
  });
}

std::tuple<Tensor, Tensor, Tensor> spatial_semantic_nms(const Tensor& scores, const Tensor& features_in,
                                                        const Tensor& positions, int64_t k,
                                                        const OptionalTensor& groups, const OptionalTensor& mask,
                                                        double radius, double sigma_spatial, double sigma_semantic,
                                                        std::string mode, double threshold) {
  const bool hard = check_spatial_semantic_nms(scores, features_in, positions, k, groups, mask, radius, sigma_spatial,
                                               sigma_semantic, mode, threshold)
                        .mode == 1;
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = scores.size(0);
  Tensor indices = new_empty(scores, {batch, k}, ScalarType::Long);
  Tensor selected = new_empty(scores, {batch, k}, wide_type(scores));
  Tensor counts = new_empty(scores, {batch}, ScalarType::Long);
  const Outputs out{
      indices.mutable_data_ptr<int64_t>(), is_float64(scores) ? nullptr : selected.mutable_data_ptr<float>(),
      is_float64(scores) ? selected.mutable_data_ptr<double>() : nullptr, counts.mutable_data_ptr<int64_t>(), k};
  const double two_spatial2 = 2 * sigma_spatial * sigma_spatial, two_semantic2 = 2 * sigma_semantic * sigma_semantic;
  const auto run_as = [&](auto tag, auto arithmetic) {
    using A = decltype(arithmetic);
    const Suppression<A> by{A(radius), A(two_spatial2), A(two_semantic2), A(threshold), hard};
    run<typename decltype(tag)::type, A>(scores, features, positions, groups, mask, by, out);
  };
  dispatch_floating(features.scalar_type(), [&](auto tag) {
    if constexpr (std::is_same_v<typename decltype(tag)::type, double>) {
      run_as(tag, double());
    } else if (is_float64(scores) || is_float64(positions)) {
      run_as(tag, double());
    } else {
      run_as(tag, float());
    }
  });
  return {indices, selected, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "spatial_semantic_nms", spatial_semantic_nms); }

}  // namespace tokenprune
