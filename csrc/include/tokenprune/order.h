// The order of candidates, in one place for every backend (contract section 1): better value first, equal values
// (also -0.0 and 0.0) by lower index, NaN after every number, infinities ordinary numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "tokenprune/macros.h"

namespace tokenprune {

// Integers that compare as the order does: a greater key is a better candidate when the largest value wins.
// NaN maps to 0, below the key of -inf. For "smallest wins" use order_key(-value): NaN stays last.
TOKENPRUNE_HD uint32_t order_key(float value) {
  if (value != value) return 0;
  if (value == 0) value = 0;  // -0.0 and 0.0 tie
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

TOKENPRUNE_HD uint64_t order_key(double value) {
  if (value != value) return 0;
  if (value == 0) value = 0;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) ? 0xFFFFFFFFFFFFFFFFull : 0x8000000000000000ull);
}

}  // namespace tokenprune
