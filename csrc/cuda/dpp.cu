// The kernels of dpp_sample for every storage type.
#include "tokenprune/dpp.cuh"

namespace tokenprune {

template cudaError_t launch_dpp<float>(const DppProblem&, const DppPlan&, float*, uint32_t*, CallStream&);
template cudaError_t launch_dpp<__half>(const DppProblem&, const DppPlan&, float*, uint32_t*, CallStream&);
template cudaError_t launch_dpp<__nv_bfloat16>(const DppProblem&, const DppPlan&, float*, uint32_t*, CallStream&);

}  // namespace tokenprune
