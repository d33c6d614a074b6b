// The kernels of density_peaks for every storage type.
#include "tokenprune/density.cuh"

namespace tokenprune {

template cudaError_t launch_density<float>(const DensityProblem&, const DensityPlan&, float*, CallStream&);
template cudaError_t launch_density<__half>(const DensityProblem&, const DensityPlan&, float*, CallStream&);
template cudaError_t launch_density<__nv_bfloat16>(const DensityProblem&, const DensityPlan&, float*, CallStream&);

}  // namespace tokenprune
