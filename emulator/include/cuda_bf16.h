// The emulator's bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = uint32_t(h.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};             // a quiet NaN
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
