// The kernels of repulsion_sample for every storage type.
#include "tokenprune/repulsion.cuh"

namespace tokenprune {

template cudaError_t launch_repulsion<float>(const RepulsionProblem&, const RepulsionPlan&, float*, uint32_t*,
                                             CallStream&);
template cudaError_t launch_repulsion<__half>(const RepulsionProblem&, const RepulsionPlan&, float*, uint32_t*,
                                              CallStream&);
template cudaError_t launch_repulsion<__nv_bfloat16>(const RepulsionProblem&, const RepulsionPlan&, float*, uint32_t*,
                                                     CallStream&);

template cudaError_t launch_gram<float>(const RepulsionProblem&, const RepulsionPlan&, float*, float*, CallStream&);
template cudaError_t launch_gram<__half>(const RepulsionProblem&, const RepulsionPlan&, float*, float*, CallStream&);
template cudaError_t launch_gram<__nv_bfloat16>(const RepulsionProblem&, const RepulsionPlan&, float*, float*,
                                                CallStream&);

}  // namespace tokenprune
