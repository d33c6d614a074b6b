// Vectors of the instruction set this file is compiled for, through the compiler's vector extension. Included only by
// cpu/simd/*.cpp; everything lives in a namespace named after the capability, so that no function compiled for one
// instruction set can be merged by the linker with its twin for another. For the same reason: no standard library
// templates in these files.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/half.h"

namespace tokenprune::TOKENPRUNE_SIMD {

#if defined(TOKENPRUNE_SIMD_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kTileKeys = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(TOKENPRUNE_SIMD_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kTileKeys = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileKeys = 6;
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));

#define TOKENPRUNE_INLINE __attribute__((always_inline)) inline

template <class A>
TOKENPRUNE_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
TOKENPRUNE_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class A>
TOKENPRUNE_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}
template <class A>
TOKENPRUNE_INLINE A horizontal_sum(Vec<A> v) {  // pairwise, in a fixed order
  A lanes[kWidth<A>];
  std::memcpy(lanes, &v, sizeof v);
  for (int half = kWidth<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
// Keeps NaN, as torch.maximum does.
template <class A>
TOKENPRUNE_INLINE Vec<A> vec_max(Vec<A> a, Vec<A> b) {
  return ((a > b) | (a != a)) ? a : b;
}

// exp with a relative error of about 1e-7; below the smallest normal number the result is 0.
TOKENPRUNE_INLINE Vec<float> vec_exp(Vec<float> x) {
  using I = Vec<int32_t>;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec<float> shifted = x * 1.44269504088896341f + kRound;
  const Vec<float> n = shifted - kRound;
  Vec<float> r = x - n * 0.693145751953125f;  // ln 2 in two parts, the first exact in products with small integers
  r = r - n * 1.42860677e-6f;
  Vec<float> p = splat(1.9875691e-4f);
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 5.0000000e-1f;
  p = p * r * r + r + 1.0f;
  I bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  power = (bits - 0x4B400000) << 23;  // n as an exponent; added to the bits of p this multiplies by 2^n
  I scaled;
  std::memcpy(&scaled, &p, sizeof scaled);
  scaled += power;
  Vec<float> result;
  std::memcpy(&result, &scaled, sizeof result);
  const Vec<float> zero = {}, infinite = splat(__builtin_inff());
  result = x < -87.3f ? zero : result;
  result = x > 88.0f ? (x > 88.72f ? infinite : result) : result;
  return x != x ? x : result;
}
TOKENPRUNE_INLINE Vec<double> vec_exp(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Widen n elements to the arithmetic type.
TOKENPRUNE_INLINE void widen(const float* from, int64_t n, float* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(float));  // an empty tensor has no address
}
TOKENPRUNE_INLINE void widen(const double* from, int64_t n, double* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(double));
}
TOKENPRUNE_INLINE void widen(const BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}
TOKENPRUNE_INLINE void widen(const Half* from, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

}  // namespace tokenprune::TOKENPRUNE_SIMD
