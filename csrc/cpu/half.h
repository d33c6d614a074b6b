// 16-bit floating-point storage types of the CPU kernels, with scalar conversions that need no instruction set.
// Header-only inline functions in files compiled for several instruction sets would be merged by the linker, so these
// are force-inlined.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tokenprune {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type arithmetic is done in: double for double, float for everything narrower.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__attribute__((always_inline)) inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

__attribute__((always_inline)) inline float to_float(BFloat16 h) { return bits_to_float(uint32_t(h.bits) << 16); }

__attribute__((always_inline)) inline float to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = uint32_t(h.bits & 0x7FFF) << 13;
  const uint32_t exponent = rest & (0x7C00u << 13);
  if (exponent == (0x7C00u << 13)) return bits_to_float(sign | rest | 0x7F800000u);  // inf, NaN
  if (exponent == 0) {  // subnormal: the sum of 2^-14 and the fraction, less 2^-14, is exact
    const float magnitude = bits_to_float(rest + (113u << 23)) - bits_to_float(113u << 23);
    return h.bits & 0x8000 ? -magnitude : magnitude;
  }
  return bits_to_float(sign | (rest + (112u << 23)));
}

__attribute__((always_inline)) inline float to_float(float x) { return x; }
__attribute__((always_inline)) inline double to_float(double x) { return x; }

}  // namespace tokenprune
