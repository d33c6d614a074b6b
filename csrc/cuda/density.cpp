// CUDA binding of density_peaks: checks, allocation, launches.
#include "tokenprune/density.h"

#include <tuple>

#include "cuda/binding.h"
#include "tokenprune/selection.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> density_peaks(const Tensor& features_in, int64_t k, int64_t neighbors,
                                                         const OptionalTensor& mask_in) {
  const char* op = "density_peaks";
  check_density_peaks(features_in, k, neighbors, mask_in);
  check_not_float64(op, {{"features", features_in}});
  const CudaScope cuda(features_in);
  const Tensor features = with_contiguous_rows(features_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = features.size(0), n = features.size(1), channels = features.size(2);
  if (n > kDensityMostTokens) fail(op, "features", "have fewer than 2^31 tokens on a GPU", n);
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  Tensor density = new_empty(features, {batch, n}, ScalarType::Float);
  Tensor distance = new_empty(features, {batch, n}, ScalarType::Float);
  Tensor value = new_empty(features, {batch, n}, ScalarType::Float);
  const DensityPlan plan = plan_density(batch, n, channels, cuda.limits());
  Tensor workspace = new_empty(features, {plan.floats()}, ScalarType::Float);
  const DensityProblem problem{features.const_data_ptr(),
                               features.stride(0),
                               features.stride(1),
                               rows_start_aligned(features),
                               mask.data(),
                               mask.stride(),
                               neighbors,
                               batch,
                               n,
                               channels,
                               density.mutable_data_ptr<float>(),
                               distance.mutable_data_ptr<float>(),
                               value.mutable_data_ptr<float>()};
  cudaError_t status = cudaSuccess;
  if (n > 0)
    status = dispatch_storage(features, [&](auto tag) {
      return launch_density<typename decltype(tag)::type>(problem, plan, workspace.mutable_data_ptr<float>(),
                                                          cuda.stream());
    });
  if (status == cudaSuccess) {
    const SelectProblem best{problem.value,
                             n,
                             mask.data(),
                             mask.stride(),
                             nullptr,
                             0,
                             nullptr,
                             0,
                             indices.mutable_data_ptr<int64_t>(),
                             counts.mutable_data_ptr<int64_t>(),
                             batch,
                             n,
                             k,
                             true};
    status = launch_select<float>(best, plan_select(batch, n, cuda.limits()), cuda.stream());
  }
  check_launch(op, status, {{"features", features}});
  return {indices, counts, density, distance};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "density_peaks", density_peaks); }

}  // namespace tokenprune
