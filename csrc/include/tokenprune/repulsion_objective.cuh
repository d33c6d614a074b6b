// The objective U of repulsion_sample, one selected token at a time. What a token keeps of the selected ones, its
// state, is for `sum` the total of the potentials, and for `max` the largest cosine or the smallest r2 (phi falls with
// r2, so phi is evaluated once and not per pair); U follows from the state.
#pragma once

#include "tokenprune/greedy.cuh"
#include "tokenprune/math.h"
#include "tokenprune/repulsion.h"
#include "tokenprune/repulsion_gram_tile.cuh"

namespace tokenprune {

// The combinations that methods use have code of their own (max-min diversity, farthest points, potential energy); the
// others look at the problem in every step.
enum class ObjectiveKind { kCosineMax, kRieszMax, kRieszSum, kOther };

// f(std::integral_constant<ObjectiveKind, the kind of the problem>).
template <class F>
auto dispatch_objective(const RepulsionProblem& p, F&& f) {
  if (p.potential == Potential::kCosine && !p.sum)
    return f(std::integral_constant<ObjectiveKind, ObjectiveKind::kCosineMax>());
  if (p.potential != Potential::kRiesz) return f(std::integral_constant<ObjectiveKind, ObjectiveKind::kOther>());
  return p.sum ? f(std::integral_constant<ObjectiveKind, ObjectiveKind::kRieszSum>())
               : f(std::integral_constant<ObjectiveKind, ObjectiveKind::kRieszMax>());
}

// The squared distance of two tokens whose coordinates are at i and j, those of another axis `i_step` and `j_step`
// floats further; symmetric to the bit.
__device__ __forceinline__ float squared_distance(const float* i, int i_step, const float* j, int j_step, int axes) {
  float result = 0;
#pragma unroll 1  // two or three times, without the start and the end of something longer
  for (; axes > 0; --axes, i += i_step, j += j_step) {
    const float difference = *i - *j;
    result = __fmaf_rn(difference, difference, result);
  }
  return result;
}

// The same of tokens i and j of a sample, without positions 0.
__device__ __forceinline__ float squared_distance(const float* positions, int axes, int64_t i, int64_t j) {
  return positions == nullptr ? 0 : squared_distance(positions + i * axes, 1, positions + j * axes, 1, axes);
}

template <ObjectiveKind kind = ObjectiveKind::kOther>
struct RepulsionObjective {
  PotentialWeights<float> weights;
  Potential other_potential;  // of kOther
  bool other_sum;

  __device__ __forceinline__ explicit RepulsionObjective(const RepulsionProblem& p)
      : weights(p.weights), other_potential(p.potential), other_sum(p.sum) {}

  __device__ __forceinline__ Potential potential() const {
    if constexpr (kind == ObjectiveKind::kOther) return other_potential;
    return kind == ObjectiveKind::kCosineMax ? Potential::kCosine : Potential::kRiesz;
  }
  __device__ __forceinline__ bool sum() const {
    if constexpr (kind == ObjectiveKind::kOther) return other_sum;
    return kind == ObjectiveKind::kRieszSum;
  }

  // The state before any token is selected.
  __device__ __forceinline__ float initial_state() const {
    if (sum()) return 0;
    return potential() == Potential::kCosine ? -INFINITY : INFINITY;
  }

  // The state of a token when another one is selected too, whose squared distance `distance` computes where it matters.
  // Without positions that is 0, and so is its weight.
  template <class Distance>
  __device__ __forceinline__ float updated(float state, float cosine, Distance&& distance) const {
    if (potential() == Potential::kCosine) return sum() ? state + cosine : nan_max(state, cosine);
    const float d2 = distance();
    if (sum())
      return state + (potential() == Potential::kRiesz
                          ? tokenprune::potential<Potential::kRiesz>(cosine, d2, weights)
                          : tokenprune::potential<Potential::kGaussian>(cosine, d2, weights));
    float r2 = weights.feature * 2 * (1 - cosine) + weights.position * d2;
    // exp(-inf / inf) is NaN although the smallest r2 may be finite.
    if (potential() == Potential::kGaussian && r2 == INFINITY && !(weights.two_sigma2 < r2)) r2 = NAN;
    return -nan_max(-state, -r2);
  }

  // The candidate that a token with this state is.
  __device__ __forceinline__ uint32_t key(float state, float energy) const {
    float value = state;
    if (!sum() && potential() != Potential::kCosine) {
      // With weights 0 and 1 the second term of r2 is the state itself.
      const PotentialWeights<float> w{0, 1, weights.half_exponent, weights.epsilon, weights.two_sigma2};
      value = potential() == Potential::kRiesz ? tokenprune::potential<Potential::kRiesz>(1.0f, state, w)
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

// The coordinates of a sample's tokens, [n, axes]; null when they do not matter.
__device__ __forceinline__ const float* positions_of(const RepulsionProblem& p, int64_t sample) {
  return p.has_distances() ? p.positions + sample * p.n * p.axes : nullptr;
}

template <class Problem>
__device__ __forceinline__ bool is_valid(const Problem& p, int64_t sample, int64_t token) {
  return p.mask == nullptr || p.mask[sample * p.mask_stride + token];
}

template <class Problem>
__device__ __forceinline__ TokenRows rows_of(const Problem& p, int64_t sample, int64_t element_size) {
  return {static_cast<const unsigned char*>(p.features) + sample * p.batch_stride * element_size, p.row_stride,
          p.channels, p.aligned};
}

}  // namespace tokenprune
