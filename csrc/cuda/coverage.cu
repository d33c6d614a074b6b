// The kernels of coverage_sample for every storage type.
#include "tokenprune/coverage.cuh"

namespace tokenprune {

template cudaError_t launch_coverage<float>(const CoverageProblem&, const CoveragePlan&, float*, CallStream&);
template cudaError_t launch_coverage<__half>(const CoverageProblem&, const CoveragePlan&, float*, CallStream&);
template cudaError_t launch_coverage<__nv_bfloat16>(const CoverageProblem&, const CoveragePlan&, float*, CallStream&);

}  // namespace tokenprune
