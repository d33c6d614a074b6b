// The order of candidates (docs/contract.md, 1.2), which every kernel in C++ takes from here: the higher value is
// better, equal values (also -0.0 and 0.0) go by the lower index, infinities are ordinary numbers, NaN of either sign
// comes after every number, and a masked token is no candidate. triton/order.py is the twin for Triton, and
// tests/ops/test_order.py holds both, and every op that selects by them, against one table.
//
// Kernels compare unsigned integer keys: a greater key is a better candidate. A key has the width of its floating-point
// format, so that a radix selection over 16-bit scores takes half as many passes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tokenprune/macros.h"

namespace tokenprune {

// The key of no candidate (masked, or taken already), and that of NaN. The key of -inf is greater in every format.
constexpr uint32_t kNoKey = 0, kNanKey = 1;

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// The key of a number that is stored as T and has the value `value`, held in an integer at least as wide.
template <class Held, class T, class A>
TOKENPRUNE_HD Held order_key_of(const T& stored, A value) {
  constexpr Held kSign = Held(1) << (8 * sizeof(T) - 1), kAll = 2 * (kSign - 1) + 1;
  BitsOf<T> narrow;
  std::memcpy(&narrow, &stored, sizeof narrow);
  const Held bits = narrow;
  if (value != value) return kNanKey;
  if (value == 0) return kSign;  // -0.0 and 0.0 tie
  return bits ^ (bits & kSign ? kAll : kSign);
}

// The same of a value as it is, in a form of its own: with the one above, the mixture kernel takes a register more.
TOKENPRUNE_HD uint32_t order_key(float value) {
  if (value != value) return kNanKey;
  if (value == 0) value = 0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

TOKENPRUNE_HD uint64_t order_key(double value) {
  if (value != value) return kNanKey;
  if (value == 0) value = 0;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) ? 0xFFFFFFFFFFFFFFFFull : 0x8000000000000000ull);
}

template <class A>
TOKENPRUNE_HD BitsOf<A> order_key(A value, bool valid) {
  return valid ? order_key(value) : kNoKey;
}

// The key of a T in the reversed order, where the lowest value is best: NaN stays last, no candidate stays none.
template <class T, class Held>
TOKENPRUNE_HD Held reversed_key(Held key) {
  return key > kNanKey ? static_cast<BitsOf<T>>(~BitsOf<T>(0)) - key : key;
}

// order_key of a number that has no sign bit and is no NaN: one operation.
template <class A>
TOKENPRUNE_HD BitsOf<A> nonnegative_key(A value) {
  BitsOf<A> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits | BitsOf<A>(1) << (8 * sizeof(A) - 1);
}

// The value behind the key of a number that is not negative: 0.0 for either zero.
TOKENPRUNE_HD float nonnegative_value_of_key(uint32_t key) {
  const uint32_t bits = key ^ 0x80000000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The same for every key, at a second operation; a NaN for kNanKey.
TOKENPRUNE_HD float value_of_key(uint32_t key) {
  return nonnegative_value_of_key(key & 0x80000000u ? key : ~key ^ 0x80000000u);
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
