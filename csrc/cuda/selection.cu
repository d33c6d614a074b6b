// The selection kernels for every storage type.
#include "tokenprune/score_entropy.cuh"

namespace tokenprune {

template cudaError_t launch_score_entropy<float>(const EntropyProblem&, cudaStream_t);
template cudaError_t launch_score_entropy<__half>(const EntropyProblem&, cudaStream_t);
template cudaError_t launch_score_entropy<__nv_bfloat16>(const EntropyProblem&, cudaStream_t);

}  // namespace tokenprune
