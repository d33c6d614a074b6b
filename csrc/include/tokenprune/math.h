// The scalar formulas of the contract that more than one backend evaluates.
#pragma once

#include <cmath>
#include <cstdint>

#include "tokenprune/macros.h"

namespace tokenprune {

// Vectors are normalised as x / max(||x||, kNormFloor), which gives a zero vector cosine 0 with everything.
constexpr double kNormFloor = 1e-12;

template <class A>
TOKENPRUNE_HD A norm_from_squares(A sum_of_squares) {
  const A norm = std::sqrt(sum_of_squares);
  return norm < A(kNormFloor) ? A(kNormFloor) : norm;  // NaN stays NaN
}

// -p log p with 0 log 0 = 0.
template <class A>
TOKENPRUNE_HD A entropy_term(A p) {
  return p == 0 ? A(0) : -p * std::log(p);
}

// Maximum that keeps NaN, as torch.maximum does.
template <class A>
TOKENPRUNE_HD A nan_max(A a, A b) {
  return (a > b || a != a) ? a : b;
}

enum class Potential { kCosine, kRiesz, kGaussian };
enum class FirstPick { kOutlier, kIsolated, kIndex };

template <class A>
struct PotentialWeights {
  A feature, position;  // weights of the two terms of r2
  A half_exponent, epsilon;
  A two_sigma2;
};

// phi(i, j) of repulsion sampling from cos(f_i, f_j) and ||p_i - p_j||^2.
template <Potential kind, class A>
TOKENPRUNE_HD A potential(A cosine, A squared_distance, const PotentialWeights<A>& w) {
  if constexpr (kind == Potential::kCosine) {
    return cosine;
  } else {
    A r2 = w.feature * 2 * (1 - cosine) + w.position * squared_distance;
    if constexpr (kind == Potential::kGaussian) return std::exp(-r2 / w.two_sigma2);
    if (r2 < 0) r2 = 0;  // the cosine of near-duplicates can round above 1
    const A power = w.half_exponent == A(0.5) ? std::sqrt(r2) : std::pow(r2, w.half_exponent);
    return 1 / (power + w.epsilon);
  }
}

// The suppression weight w of spatial-semantic NMS (AdaptPrune).
template <class A>
TOKENPRUNE_HD A suppression(A cosine, A squared_distance, A two_spatial2, A two_semantic2) {
  const A gap = 1 - cosine;
  return std::exp(-squared_distance / two_spatial2) * std::exp(-(gap * gap) / two_semantic2);
}

}  // namespace tokenprune
