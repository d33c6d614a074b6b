// The kernel of select_mixture.
#include "tokenprune/mixture.cuh"

namespace tokenprune {

cudaError_t launch_mixture(const MixtureProblem& p, const MixturePlan& plan, CallStream& stream) {
  const auto shared = static_cast<size_t>(plan.bytes(true));
  return launch({p.batch, dim3(plan.threads), shared, stream}, mixture_kernel, p, plan);
}

}  // namespace tokenprune
