// dpp_sample: greedy MAP of a determinantal point process by the incremental Cholesky factor (Chen et al., arXiv
// 1709.05135). Two algorithms, which plan_dpp chooses from: dpp_matrix.cuh and dpp_rows.cuh.
#pragma once

#include "tokenprune/dpp_matrix.cuh"
#include "tokenprune/dpp_rows.cuh"

namespace tokenprune {

inline DppProblem samples_of(const DppProblem& p, int64_t first, int64_t count, int64_t element_size) {
  DppProblem part = samples_of(p, &DppProblem::features, first, count, element_size);
  if (p.quality != nullptr) part.quality += first * p.n;
  part.gains += first * p.k;
  return part;
}

template <class T>
cudaError_t launch_dpp(const DppProblem& p, const DppPlan& plan, float* floats, uint32_t* words, CallStream& stream) {
  for (int64_t first = 0; first < p.batch; first += plan.samples) {
    const DppProblem part = samples_of(p, first, std::min(plan.samples, p.batch - first), sizeof(T));
    const cudaError_t status = plan.matrix ? launch_dpp_matrix<T>(part, plan, floats, stream)
                                           : launch_dpp_rows<T>(part, plan, floats, words, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace tokenprune
