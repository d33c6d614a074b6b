#include "cpu/simd/repulsion.h"

#include "cpu/simd/vec.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

// Accumulators of a tile: kMaxPairRows x kPairColumns, with room for the operands.
#if defined(TOKENPRUNE_SIMD_AVX512)
constexpr int kPairColumns = 6;
#elif defined(TOKENPRUNE_SIMD_AVX2)
constexpr int kPairColumns = 3;
#else
constexpr int kPairColumns = 2;
#endif

template <class A, int R, int S>
TOKENPRUNE_INLINE void pair_tile(const A* const* rows, const A* const* others, int64_t dim, A* out, int64_t stride) {
  Vec<A> sum[R][S];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sum[r][s] = Vec<A>{};
  for (int64_t d = 0; d < dim; d += kWidth<A>) {
    Vec<A> other[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) other[s] = load(others[s] + d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> row = load(rows[r] + d);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sum[r][s] += row * other[s];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) out[r * stride + s] = horizontal_sum<A>(sum[r][s]);
}

// Columns left over after the full tiles, S of them at most.
template <class A, int R, int S>
TOKENPRUNE_INLINE void pair_rest(const A* const* rows, const A* const* others, int64_t n, int64_t dim, A* out,
                                 int64_t stride) {
  if constexpr (S > 0) {
    if (n == S)
      pair_tile<A, R, S>(rows, others, dim, out, stride);
    else
      pair_rest<A, R, S - 1>(rows, others, n, dim, out, stride);
  }
}

template <class A, int R>
void pair_columns(const A* const* rows, const A* const* others, int64_t n, int64_t dim, A* out) {
  int64_t s = 0;
  for (; s + kPairColumns <= n; s += kPairColumns) pair_tile<A, R, kPairColumns>(rows, others + s, dim, out + s, n);
  pair_rest<A, R, kPairColumns - 1>(rows, others + s, n - s, dim, out + s, n);
}

template <class A>
void pair_dots(const A* const* rows, int64_t n_rows, const A* const* others, int64_t n_others, int64_t dim, A* out) {
  switch (n_rows) {
    case 1:
      return pair_columns<A, 1>(rows, others, n_others, dim, out);
    case 2:
      return pair_columns<A, 2>(rows, others, n_others, dim, out);
    case 3:
      return pair_columns<A, 3>(rows, others, n_others, dim, out);
    default:
      return pair_columns<A, 4>(rows, others, n_others, dim, out);
  }
}

TOKENPRUNE_INLINE float power(float x, float y) { return __builtin_powf(x, y); }
TOKENPRUNE_INLINE double power(double x, double y) { return __builtin_pow(x, y); }
TOKENPRUNE_INLINE float root(float x) { return __builtin_sqrtf(x); }
TOKENPRUNE_INLINE double root(double x) { return __builtin_sqrt(x); }

template <class A>
void potentials(Potential kind, const PotentialWeights<A>& w, const A* squared_distances, int64_t n, A* row) {
  if (kind == Potential::kCosine) return;
  const A feature = w.feature * 2, position = w.position, epsilon = w.epsilon, half_exponent = w.half_exponent;
  for (int64_t i = 0; i < n; ++i) row[i] = feature * (1 - row[i]) + position * squared_distances[i];
  if (kind == Potential::kGaussian) {
    const A two_sigma2 = w.two_sigma2;
    for (int64_t i = 0; i < n; i += kWidth<A>) store(row + i, vec_exp(-load(row + i) / two_sigma2));
    return;
  }
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] < 0 ? 0 : row[i];  // near-duplicates: a cosine can round above 1
  if (half_exponent == A(0.5))
    for (int64_t i = 0; i < n; ++i) row[i] = root(row[i]);
  else if (half_exponent != 1)
    for (int64_t i = 0; i < n; ++i) row[i] = power(row[i], half_exponent);
  for (int64_t i = 0; i < n; ++i) row[i] = 1 / (row[i] + epsilon);
}

// The candidate order (tokenprune/order.h) for the lowest of numbers below +inf, without integer keys: they would cost
// an operation per element.
template <class A>
int64_t add_and_pick(const A* row, const A* energy, int64_t n, A* totals) {
  using Index = Vec<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
  constexpr int width = kWidth<A>;
  Vec<A> best = splat<A>(sizeof(A) == 4 ? A(__builtin_inff()) : A(__builtin_inf()));
  Index at = Index{} - 1, here = {};
  for (int l = 0; l < width; ++l) here[l] = l;
  for (int64_t i = 0; i < n; i += width, here += width) {
    const Vec<A> total = load(totals + i) + load(row + i);
    store(totals + i, total);
    const Vec<A> value = total + load(energy + i);
    const Index better = value < best;
    best = better ? value : best;
    at = better ? here : at;
  }
  int64_t found = -1;
  A smallest = 0;
  for (int l = 0; l < width; ++l) {
    if (at[l] < 0) continue;
    if (found < 0 || best[l] < smallest || (best[l] == smallest && at[l] < found)) {
      found = at[l];
      smallest = best[l];
    }
  }
  return found;
}

}  // namespace

extern const RepulsionKernels<float> repulsion_f32;
extern const RepulsionKernels<double> repulsion_f64;
const RepulsionKernels<float> repulsion_f32 = {pair_dots<float>, potentials<float>, add_and_pick<float>};
const RepulsionKernels<double> repulsion_f64 = {pair_dots<double>, potentials<double>, add_and_pick<double>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
