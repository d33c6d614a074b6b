// What the bindings of repulsion_sample share of its arguments, on the CPU and on CUDA.
#pragma once

#include "tokenprune/math.h"

namespace tokenprune {

template <class A>
PotentialWeights<A> potential_weights(double feature_weight, double position_weight, double exponent, double sigma,
                                      double epsilon, bool with_positions) {
  return {static_cast<A>(feature_weight), static_cast<A>(with_positions ? position_weight : 0.0),
          static_cast<A>(exponent / 2), static_cast<A>(epsilon), static_cast<A>(2 * sigma * sigma)};
}

}  // namespace tokenprune
