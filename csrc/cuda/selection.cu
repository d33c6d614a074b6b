// The selection kernels for every storage type.
#include "tokenprune/selection_entropy.cuh"
#include "tokenprune/selection_grouped.cuh"
#include "tokenprune/selection_topk.cuh"

namespace tokenprune {

template cudaError_t launch_score_entropy<float>(const EntropyProblem&, cudaStream_t);
template cudaError_t launch_score_entropy<__half>(const EntropyProblem&, cudaStream_t);
template cudaError_t launch_score_entropy<__nv_bfloat16>(const EntropyProblem&, cudaStream_t);

template cudaError_t launch_select<float>(const SelectProblem&, const SelectPlan&, cudaStream_t);
template cudaError_t launch_select<__half>(const SelectProblem&, const SelectPlan&, cudaStream_t);
template cudaError_t launch_select<__nv_bfloat16>(const SelectProblem&, const SelectPlan&, cudaStream_t);

template cudaError_t launch_select_grouped<float>(const GroupedProblem&, const GroupedPlan&, cudaStream_t);
template cudaError_t launch_select_grouped<__half>(const GroupedProblem&, const GroupedPlan&, cudaStream_t);
template cudaError_t launch_select_grouped<__nv_bfloat16>(const GroupedProblem&, const GroupedPlan&, cudaStream_t);

cudaError_t launch_mask_to_indices(const MaskProblem& problem, const SelectPlan& plan, cudaStream_t stream) {
  return launch(select_launch(problem.batch, plan, stream), mask_kernel, problem);
}

}  // namespace tokenprune
