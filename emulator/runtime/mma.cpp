// What a tensor core computes, by the model that measurements of real ones agree with: a group of products and the
// accumulator are cut to the bits that the largest of them has, added without a rounding, and the sum is cut to
// float32.
#pragma GCC optimize("O3")

#include <cmath>
#include <cstring>

#include "emulator/ptx.h"

namespace tokenprune::emulator {

namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;
constexpr int kLowest = -126;  // float32's smallest exponent
constexpr int kOfZero = -1000;

int exponent(float x) { return x == 0 ? kOfZero : std::isfinite(x) ? std::ilogb(x) : 0; }

double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(1023 + exponent) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// The 24 leading bits of a number.
double truncated(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= ~((uint64_t(1) << 29) - 1);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void add_truncating(const float (&left)[kRows][kDepth], const float (&right)[kDepth][kColumns],
                    float (&sums)[kRows][kColumns], int group, int extra_bits) {
  int left_exponents[kRows][kDepth], right_exponents[kDepth][kColumns];
  for (int k = 0; k < kDepth; ++k) {
    for (int r = 0; r < kRows; ++r) left_exponents[r][k] = exponent(left[r][k]);
    for (int c = 0; c < kColumns; ++c) right_exponents[k][c] = exponent(right[k][c]);
  }
  for (int r = 0; r < kRows; ++r)
    for (int begin = 0; begin < kDepth; begin += group) {
      // A product of significands below 2 may reach 4; it is aligned by the sum of the exponents.
      int top[kColumns];
      double plain[kColumns], scale[kColumns], sum[kColumns];
      for (int c = 0; c < kColumns; ++c) top[c] = std::max(kLowest, exponent(sums[r][c]));
      for (int k = begin; k < begin + group; ++k)
        for (int c = 0; c < kColumns; ++c) top[c] = std::max(top[c], left_exponents[r][k] + right_exponents[k][c]);
      for (int c = 0; c < kColumns; ++c) {
        scale[c] = power_of_two(23 + extra_bits - top[c]);
        plain[c] = sums[r][c];
        sum[c] = std::trunc(plain[c] * scale[c]);
      }
      for (int k = begin; k < begin + group; ++k)
        for (int c = 0; c < kColumns; ++c) {
          const double product = double(left[r][k]) * double(right[k][c]);
          plain[c] += product;
          sum[c] += std::trunc(product * scale[c]);
        }
      for (int c = 0; c < kColumns; ++c)
        sums[r][c] = static_cast<float>(std::isfinite(plain[c]) ? truncated(sum[c] / scale[c]) : plain[c]);
    }
}

}  // namespace

void multiply_accumulate(const float (&left)[kRows][kDepth], const float (&right)[kDepth][kColumns],
                         float (&sums)[kRows][kColumns]) {
  const Settings& now = settings();
  if (now.mma_rounding == MmaRounding::kTruncate) {
    add_truncating(left, right, sums, now.mma_group, now.mma_extra_bits);
    return;
  }
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kDepth; ++k)
      for (int c = 0; c < kColumns; ++c) sums[r][c] += left[r][k] * right[k][c];
}

}  // namespace tokenprune::emulator
