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

// The nearest value of a narrower type, ties to even.
template <class T>
__attribute__((always_inline)) inline T rounded_to(Wide<T> x) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits & 0x80000000u, magnitude = bits & 0x7FFFFFFFu;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
      return {static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : nearest)};
    } else {
      const float subnormal = bits_to_float(magnitude) + 0.5f;  // whose last place is that of a subnormal half
      uint32_t of_subnormal;
      std::memcpy(&of_subnormal, &subnormal, sizeof of_subnormal);
      uint32_t nearest = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1)) >> 13;
      nearest = magnitude < (113u << 23) ? of_subnormal - (126u << 23) : nearest;
      nearest = magnitude >= 0x477FF000u ? 0x7C00u : nearest;  // 65520, from where on infinity is nearer
      nearest = magnitude > 0x7F800000u ? 0x7E00u : nearest;
      return {static_cast<uint16_t>(sign >> 16 | nearest)};
    }
  }
}

}  // namespace tokenprune
