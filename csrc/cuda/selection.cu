// The selection kernels for every storage type.
#include "tokenprune/selection_entropy.cuh"
#include "tokenprune/selection_grouped.cuh"
#include "tokenprune/selection_topk.cuh"

namespace tokenprune {

template cudaError_t launch_score_entropy<float>(const EntropyProblem&, CallStream&);
template cudaError_t launch_score_entropy<__half>(const EntropyProblem&, CallStream&);
template cudaError_t launch_score_entropy<__nv_bfloat16>(const EntropyProblem&, CallStream&);

template cudaError_t launch_select<float>(const SelectProblem&, const SelectPlan&, CallStream&);
template cudaError_t launch_select<__half>(const SelectProblem&, const SelectPlan&, CallStream&);
template cudaError_t launch_select<__nv_bfloat16>(const SelectProblem&, const SelectPlan&, CallStream&);

template cudaError_t launch_select_grouped<float>(const GroupedProblem&, const GroupedPlan&, CallStream&);
template cudaError_t launch_select_grouped<__half>(const GroupedProblem&, const GroupedPlan&, CallStream&);
template cudaError_t launch_select_grouped<__nv_bfloat16>(const GroupedProblem&, const GroupedPlan&, CallStream&);

cudaError_t launch_mask_to_indices(const MaskProblem& problem, const SelectPlan& plan, CallStream& stream) {
  return launch(select_launch(problem.batch, plan, stream), mask_kernel, problem);
}

}  // namespace tokenprune
