// The order of candidates, which every kernel in C++ takes from here: the higher value is better, equal values (also
// -0.0 and 0.0) go by the lower index, infinities are ordinary numbers, NaN of either sign comes after every number,
// and a masked token is no candidate. triton/order.py is the twin for Triton; tests/ops/test_order.py holds both
// against one table, and every op that selects by it.
//
// Kernels compare unsigned integer keys: a greater key is a better candidate. A key has the width of its floating-point
// format, so that a radix selection over 16-bit scores takes half as many passes.
#pragma once

#include <cstdint>
#include <cstring>

#include "tokenprune/macros.h"

namespace tokenprune {

// The key of no candidate (masked, or taken already), and that of NaN. The key of -inf is greater in every format.
constexpr uint32_t kNoKey = 0, kNanKey = 1;

// The key of a number that is stored as `stored` and has the value `value`; Key is as wide as what is stored.
template <class Key, class T, class A>
TOKENPRUNE_HD Key order_key_of(const T& stored, A value) {
  static_assert(sizeof(Key) == sizeof(T), "a key has the width of the format");
  constexpr Key kSign = static_cast<Key>(Key(1) << (8 * sizeof(Key) - 1)), kAll = static_cast<Key>(~Key(0));
  Key bits;
  std::memcpy(&bits, &stored, sizeof bits);
  if (value != value) return kNanKey;
  if (value == 0) return kSign;  // -0.0 and 0.0 tie
  return static_cast<Key>(bits ^ (bits & kSign ? kAll : kSign));
}

TOKENPRUNE_HD uint32_t order_key(float value) { return order_key_of<uint32_t>(value, value); }
TOKENPRUNE_HD uint64_t order_key(double value) { return order_key_of<uint64_t>(value, value); }

template <class A>
TOKENPRUNE_HD auto order_key(A value, bool valid) {
  return valid ? order_key(value) : kNoKey;
}

// The key in the reversed order, where the lowest value is best: NaN stays last, no candidate stays none. The key may
// be held in a wider integer than the one it is a key of.
template <class Key, class Held>
TOKENPRUNE_HD Held reversed_key(Held key) {
  return key > kNanKey ? static_cast<Key>(~Key(0)) - key : key;
}

// The value behind a key: 0.0 for either zero, and a NaN for kNanKey.
TOKENPRUNE_HD float value_of_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The same for keys of numbers that are not negative, in one operation.
TOKENPRUNE_HD float nonnegative_value_of_key(uint32_t key) {
  const uint32_t bits = key ^ 0x80000000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A key and its token. `a < b` says that a is the better candidate: sorting puts the best one first.
template <class Key, class Index>
struct Ranked {
  Key key;
  Index index;
};

template <class Key, class Index>
TOKENPRUNE_HD bool operator<(const Ranked<Key, Index>& a, const Ranked<Key, Index>& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// Both in one integer, of which the greater is the better candidate; 0 for no candidate.
TOKENPRUNE_HD uint64_t pack_ranked(uint32_t key, uint32_t index) {
  return key == kNoKey ? 0 : static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - index);
}
TOKENPRUNE_HD uint32_t index_of_packed(uint64_t packed) { return 0xFFFFFFFFu - static_cast<uint32_t>(packed); }

}  // namespace tokenprune
