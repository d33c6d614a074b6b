// CUDA binding of dpp_sample: checks, allocation, launches.
#include "tokenprune/dpp.h"

#include <tuple>

#include "cuda/binding.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor, Tensor> dpp_sample(const Tensor& features_in, int64_t k, const OptionalTensor& quality_in,
                                              const OptionalTensor& mask_in, double epsilon) {
  const char* op = "dpp_sample";
  check_dpp_sample(features_in, k, quality_in, mask_in, epsilon);
  check_not_float64(op, {{"features", features_in}});
  const CudaScope cuda(features_in);
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = features.size(0), n = features.size(1);
  const OptionalTensor quality = contiguous_floats(op, "quality", quality_in);
  const MaskArgument mask(mask_in);
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor gains = new_empty(features, {batch, k}, ScalarType::Float);
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  const DppProblem problem{features.const_data_ptr(),
                           features.stride(0),
                           features.stride(1),
                           rows_start_aligned(features),
                           quality ? quality->const_data_ptr<float>() : nullptr,
                           mask.data(),
                           mask.stride(),
                           static_cast<float>(epsilon),
                           batch,
                           n,
                           features.size(2),
                           k,
                           indices.mutable_data_ptr<int64_t>(),
                           gains.mutable_data_ptr<float>(),
                           counts.mutable_data_ptr<int64_t>()};
  const DppPlan plan = plan_dpp(problem, cuda.limits());
  Tensor floats = new_empty(features, {plan.floats()}, ScalarType::Float);
  Tensor integers = new_empty(features, {plan.words()}, ScalarType::Int);
  const cudaError_t status = dispatch_storage(features, [&](auto tag) {
    return launch_dpp<typename decltype(tag)::type>(problem, plan, floats.mutable_data_ptr<float>(),
                                                    reinterpret_cast<uint32_t*>(integers.mutable_data_ptr<int32_t>()),
                                                    cuda.stream());
  });
  check_launch(op, status, {{"features", features}});
  return {indices, gains, counts};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "dpp_sample", dpp_sample); }

}  // namespace tokenprune
