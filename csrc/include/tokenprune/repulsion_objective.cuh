// The objective U of repulsion_sample, one selected token at a time. What a token keeps of the selected ones, its
// state, is for `sum` the total of the potentials, and for `max` the largest cosine or the smallest r2 (phi falls with
// r2, so phi is evaluated once and not per pair); U follows from the state.
#pragma once

#include "tokenprune/greedy.cuh"
#include "tokenprune/math.h"
#include "tokenprune/repulsion.h"
#include "tokenprune/repulsion_gram_tile.cuh"

namespace tokenprune {

// One sample's tokens, as far as the objective needs them.
struct RepulsionObjective {
  Potential potential;
  bool sum;
  PotentialWeights<float> weights;
  const float* positions;  // [n, axes], or null when they do not matter
  int64_t axes;

  __device__ __forceinline__ RepulsionObjective(const RepulsionProblem& p, int64_t sample)
      : potential(p.potential), sum(p.sum), weights(p.weights), positions(nullptr), axes(p.axes) {
    if (p.positions != nullptr && potential != Potential::kCosine) positions = p.positions + sample * p.n * axes;
  }

  // The state before any token is selected.
  __device__ __forceinline__ float initial_state() const {
    if (sum) return 0;
    return potential == Potential::kCosine ? -INFINITY : INFINITY;
  }

  __device__ __forceinline__ float squared_distance(int64_t i, int64_t j) const {
    float result = 0;
    if (positions == nullptr) return result;
    for (int64_t a = 0; a < axes; ++a) {
      const float difference = positions[i * axes + a] - positions[j * axes + a];
      result = __fmaf_rn(difference, difference, result);
    }
    return result;
  }

  // The state of token i when j is selected too.
  __device__ __forceinline__ float updated(float state, float cosine, int64_t i, int64_t j) const {
    if (potential == Potential::kCosine) return sum ? state + cosine : nan_max(state, cosine);
    const float distance = squared_distance(i, j);
    if (sum)
      return state + (potential == Potential::kRiesz
                          ? tokenprune::potential<Potential::kRiesz>(cosine, distance, weights)
                          : tokenprune::potential<Potential::kGaussian>(cosine, distance, weights));
    float r2 = weights.feature * 2 * (1 - cosine);
    if (positions != nullptr) r2 += weights.position * distance;
    // exp(-inf / inf) is NaN although the smallest r2 may be finite.
    if (potential == Potential::kGaussian && r2 == INFINITY && !(weights.two_sigma2 < r2)) r2 = NAN;
    return -nan_max(-state, -r2);
  }

  // The candidate that token i with this state is.
  __device__ __forceinline__ uint32_t key(float state, float energy) const {
    float value = state;
    if (!sum && potential != Potential::kCosine) {
      // With weights 0 and 1 the second term of r2 is the state itself.
      const PotentialWeights<float> w{0, 1, weights.half_exponent, weights.epsilon, weights.two_sigma2};
      value = potential == Potential::kRiesz ? tokenprune::potential<Potential::kRiesz>(1.0f, state, w)
                                             : tokenprune::potential<Potential::kGaussian>(1.0f, state, w);
    }
    return order_key(-(value + energy));
  }
};

// The cosine from an inner product; symmetric to the bit. A norm that overflows gives an inverse of 0.
__device__ __forceinline__ float cosine_of(float dot, float inverse_i, float inverse_j) {
  return dot * (inverse_i * inverse_j);
}

__device__ __forceinline__ float inverse_norm(float sum_of_squares) { return 1 / norm_from_squares(sum_of_squares); }

// A seed that names a token of the sample, else -1 (contract: out of range counts as no entry).
__device__ __forceinline__ int64_t valid_seed(int64_t seed, int64_t n) { return seed >= 0 && seed < n ? seed : -1; }

__device__ __forceinline__ bool is_valid(const RepulsionProblem& p, int64_t sample, int64_t token) {
  return p.mask == nullptr || p.mask[sample * p.mask_stride + token];
}

__device__ __forceinline__ TokenRows rows_of(const RepulsionProblem& p, int64_t sample, int64_t element_size) {
  return {static_cast<const unsigned char*>(p.features) + sample * p.batch_stride * element_size, p.row_stride,
          p.channels, p.aligned};
}

}  // namespace tokenprune
