// Vectors of the instruction set this file is compiled for, through the compiler's vector extension. Included only by
// cpu/simd/*.cpp; everything lives in a namespace named after the capability, so that no function compiled for one
// instruction set can be merged by the linker with its twin for another. For the same reason: no standard library
// templates in these files.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/half.h"

namespace tokenprune::TOKENPRUNE_SIMD {

#if defined(TOKENPRUNE_SIMD_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kTileKeys = 8;  // 8 x 2 accumulators of 32 registers: rows a power of two apart share 8 lines of a cache
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
template <class A, int bytes>
struct VectorOfBytes {
  typedef A type __attribute__((vector_size(bytes)));
};
// Half of a vector. In registers wherever the compiler can be told so: a half that is copied out of memory keeps the vector
// there, and with it the accumulators of the loop that it comes from.
template <class A, int bytes, bool upper, int... lane>
TOKENPRUNE_INLINE auto half_of(typename VectorOfBytes<A, bytes>::type v, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (upper * sizeof...(lane) + lane)...);
#else
  typename VectorOfBytes<A, bytes / 2>::type half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + upper * sizeof half, sizeof half);
  return half;
#endif
}
template <class A, int bytes, bool upper>
TOKENPRUNE_INLINE auto half_of(typename VectorOfBytes<A, bytes>::type v) {
  return half_of<A, bytes, upper>(v, std::make_integer_sequence<int, bytes / 2 / sizeof(A)>());
}
// A vector folded onto `bytes` bytes: the upper half is added to the lower one until that size is reached.
template <class A, int bytes, int from = kVectorBytes>
TOKENPRUNE_INLINE auto fold(typename VectorOfBytes<A, from>::type v) {
  if constexpr (from <= bytes)
    return v;
  else
    return fold<A, bytes, from / 2>(half_of<A, from, false>(v) + half_of<A, from, true>(v));
}
template <class A>
TOKENPRUNE_INLINE A horizontal_sum(Vec<A> v) {  // pairwise, in a fixed order
  const auto pair = fold<A, 2 * sizeof(A)>(v);
  return pair[0] + pair[1];
}
// Four elements of the eight that a and b hold together.
template <int i, int j, int k, int l, class Quad>
TOKENPRUNE_INLINE Quad shuffle(Quad a, Quad b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  using Order = decltype(a < b);
  return __builtin_shuffle(a, b, Order{i, j, k, l});
#endif
}
// Keeps NaN, as torch.maximum does.
template <class A>
TOKENPRUNE_INLINE Vec<A> vec_max(Vec<A> a, Vec<A> b) {
  return ((a > b) | (a != a)) ? a : b;
}

template <class A>
TOKENPRUNE_INLINE A larger(A a, A b) {
  return (a > b || a != a) ? a : b;
}
TOKENPRUNE_INLINE float log_of(float x) { return __builtin_logf(x); }
TOKENPRUNE_INLINE double log_of(double x) { return __builtin_log(x); }

// Where exp is 0 and its argument can be cut off.
template <class A>
constexpr A kExpLowest = sizeof(A) == 4 ? A(-100) : A(-800);

// exp of numbers from kExpLowest to the largest that does not overflow, within 1 unit in the last place; 0 where the
// result would be subnormal.
TOKENPRUNE_INLINE Vec<float> vec_exp_normal(Vec<float> x) {
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
  p = p * (r * r) + r;
  p = p + 1.0f;
  I bits, scaled;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&scaled, &p, sizeof scaled);
  scaled += bits << 23;  // n as an exponent: added to the bits of p this multiplies by 2^n
  Vec<float> result;
  std::memcpy(&result, &scaled, sizeof result);
  const Vec<float> zero = {};
  return x < -87.3f ? zero : result;
}
TOKENPRUNE_INLINE Vec<double> vec_exp_normal(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// exp of anything: inf above the largest exponent, NaN kept.
TOKENPRUNE_INLINE Vec<float> vec_exp(Vec<float> x) {
  const Vec<float> infinite = splat(__builtin_inff()), low = splat(kExpLowest<float>), high = splat(88.722835f);
  Vec<float> safe = x > low ? x : low;
  safe = safe > high ? high : safe;
  const Vec<float> result = x > high ? infinite : vec_exp_normal(safe);
  return x != x ? x : result;
}
TOKENPRUNE_INLINE Vec<double> vec_exp(Vec<double> x) { return vec_exp_normal(x); }

// Widen n elements to the arithmetic type.
TOKENPRUNE_INLINE void widen(const float* from, int64_t n, float* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(float));  // an empty tensor has no address
}
TOKENPRUNE_INLINE void widen(const double* from, int64_t n, double* to) {
  if (n > 0) std::memcpy(to, from, n * sizeof(double));
}
// One vector of the arithmetic type from elements of any type.
TOKENPRUNE_INLINE Vec<float> load_wide(const float* from) { return load(from); }
TOKENPRUNE_INLINE Vec<double> load_wide(const double* from) { return load(from); }
TOKENPRUNE_INLINE Vec<float> load_wide(const BFloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const Vec<uint32_t> bits = __builtin_convertvector(narrow, Vec<uint32_t>) << 16;
  Vec<float> wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
TOKENPRUNE_INLINE Vec<float> load_wide(const Half* from) {
  Vec<float> wide;
#if defined(TOKENPRUNE_SIMD_AVX512)
  // The masked form, because GCC 12 warns about the undefined source operand of the plain one.
  const __m512 converted = _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  std::memcpy(&wide, &converted, sizeof wide);
#elif defined(__F16C__)
  const __m256 converted = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  std::memcpy(&wide, &converted, sizeof wide);
#else
  for (int i = 0; i < kWidth<float>; ++i) wide[i] = to_float(from[i]);
#endif
  return wide;
}

template <class T>
TOKENPRUNE_INLINE void widen(const T* from, int64_t n, float* to) {
  constexpr int width = kWidth<float>;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(to + i, load_wide(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

}  // namespace tokenprune::TOKENPRUNE_SIMD
