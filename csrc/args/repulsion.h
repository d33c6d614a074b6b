// Checked arguments of repulsion_sample, shared by the CPU and the CUDA bindings.
#pragma once

#include <algorithm>
#include <string>

#include "checks.h"
#include "tokenprune/math.h"

namespace tokenprune {

// The keyword arguments of repulsion_sample that are not tensors, as the schema passes them.
struct RepulsionKeywords {
  const std::string &potential, &aggregate, &first;
  double feature_weight, position_weight, exponent, sigma, epsilon;
};

// The words among them, decoded.
struct RepulsionChoice {
  Potential potential;
  bool sum;
  FirstPick first;
};

inline RepulsionChoice check_repulsion_sample(const Tensor& features, int64_t k, const OptionalTensor& positions,
                                              const OptionalTensor& seed_indices, const OptionalTensor& energy,
                                              const OptionalTensor& mask, const RepulsionKeywords& words) {
  const char* op = "repulsion_sample";
  check_floating(op, "features", features, "[B, N, C]", 3);
  const int64_t batch = features.size(0), n = features.size(1);
  check_count(op, "k", k, batch);
  check_beside(op, "positions", positions, features, "[B, N, P]", {batch, n, -1}, std::nullopt);
  check_beside(op, "seed_indices", seed_indices, features, "[B, S]", {batch, -1}, ScalarType::Long);
  check_beside(op, "energy", energy, features, "[B, N]", {batch, n}, std::nullopt);
  check_beside(op, "mask", mask, features, "[B, N]", {batch, n}, ScalarType::Bool);
  const int64_t listed = seed_indices ? seed_indices->size(1) : 0, places = positions ? positions->size(2) : 0;
  check_work(op, "features", "B * N * max(N, S) * max(C, P)",
             {batch, n, std::max(n, listed), std::max(features.size(2), places)});
  RepulsionChoice choice;
  choice.potential =
      static_cast<Potential>(check_option(op, "potential", words.potential, {"cosine", "riesz", "gaussian"}));
  choice.sum = check_option(op, "aggregate", words.aggregate, {"max", "sum"}) == 1;
  choice.first = static_cast<FirstPick>(check_option(op, "first", words.first, {"outlier", "isolated", "index"}));
  check_real(op, "feature_weight", words.feature_weight, 0);
  check_real(op, "position_weight", words.position_weight, 0);
  check_real(op, "exponent", words.exponent, 0, true);
  check_real(op, "sigma", words.sigma, 0, true);
  check_real(op, "epsilon", words.epsilon, 0);
  return choice;
}

template <class A>
PotentialWeights<A> potential_weights(const RepulsionKeywords& words, bool with_positions) {
  return {static_cast<A>(words.feature_weight), static_cast<A>(with_positions ? words.position_weight : 0.0),
          static_cast<A>(words.exponent / 2), static_cast<A>(words.epsilon),
          static_cast<A>(2 * words.sigma * words.sigma)};
}

}  // namespace tokenprune
