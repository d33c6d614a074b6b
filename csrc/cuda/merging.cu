// The kernels of merge_tokens for every storage type.
#include "tokenprune/merging.cuh"

namespace tokenprune {

cudaError_t launch_copy_assignment(const int64_t* given, int64_t stride, int64_t batch, int64_t n, int64_t slots,
                                   int64_t* assignment, CallStream& stream) {
  return launch({ceil_div<int64_t>(batch * n, kMergeThreads), dim3(kMergeThreads), 0, stream}, copy_assignment_kernel,
                given, stride, n, batch * n, slots, assignment);
}

template cudaError_t launch_assign<float>(const AssignProblem&, const AssignPlan&, CallStream&);
template cudaError_t launch_assign<__half>(const AssignProblem&, const AssignPlan&, CallStream&);
template cudaError_t launch_assign<__nv_bfloat16>(const AssignProblem&, const AssignPlan&, CallStream&);

template cudaError_t launch_means<float>(const MeanProblem&, CallStream&);
template cudaError_t launch_means<__half>(const MeanProblem&, CallStream&);
template cudaError_t launch_means<__nv_bfloat16>(const MeanProblem&, CallStream&);

}  // namespace tokenprune
