// repulsion_sample: greedy selection of mutually repelling tokens. Three algorithms, which plan_repulsion chooses from:
// repulsion_gram.cuh, repulsion_points.cuh and repulsion_rounds.cuh.
#pragma once

#include "tokenprune/repulsion_rounds.cuh"

namespace tokenprune {

inline RepulsionProblem samples_of(const RepulsionProblem& p, int64_t first, int64_t count, int64_t element_size) {
  RepulsionProblem part = samples_of(p, &RepulsionProblem::features, first, count, element_size);
  if (p.positions != nullptr) part.positions += first * p.n * p.axes;
  if (p.seeds != nullptr) part.seeds += first * p.n_seeds;
  if (p.energy != nullptr) part.energy += first * p.n;
  return part;
}

template <class T>
cudaError_t launch_repulsion_picks(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats, uint32_t* words,
                                   CallStream& stream) {
  const RepulsionWorkspace w(plan, floats, words, p.n);
  const cudaError_t status = launch_start<T>(p, plan, w, stream);
  if (status != cudaSuccess) return status;
  return plan.algorithm == RepulsionAlgorithm::kPoints ? launch_points(p, plan, w, stream)
                                                       : launch_rounds<T>(p, plan, w, stream);
}

template <class T>
cudaError_t launch_repulsion(const RepulsionProblem& p, const RepulsionPlan& plan, float* floats, uint32_t* words,
                             CallStream& stream) {
  for (int64_t first = 0; first < p.batch; first += plan.samples) {
    const RepulsionProblem part = samples_of(p, first, std::min(plan.samples, p.batch - first), sizeof(T));
    const cudaError_t status = plan.algorithm == RepulsionAlgorithm::kMatrix
                                   ? launch_repulsion_gram<T>(part, plan, floats, stream)
                                   : launch_repulsion_picks<T>(part, plan, floats, words, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace tokenprune
