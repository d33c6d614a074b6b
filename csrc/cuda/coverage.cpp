// CUDA binding of coverage_sample: checks, allocation, launches.
#include "tokenprune/coverage.h"

#include <tuple>

#include "cuda/binding.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor, Tensor> coverage_sample(const Tensor& similarity_in, int64_t k,
                                                   const OptionalTensor& row_weights_in,
                                                   const OptionalTensor& quality_in, const OptionalTensor& row_mask_in,
                                                   const OptionalTensor& mask_in) {
  const char* op = "coverage_sample";
  check_coverage_sample(similarity_in, k, row_weights_in, quality_in, row_mask_in, mask_in);
  check_not_float64(op, {{"similarity", similarity_in}});
  check_greedy_tokens(op, "similarity", std::max(similarity_in.size(1), similarity_in.size(2)));  // rows, too
  const CudaScope cuda(similarity_in);
  const Tensor similarity = with_contiguous_rows(similarity_in);
  const int64_t batch = similarity.size(0);
  const OptionalTensor row_weights = contiguous_floats(op, "row_weights", row_weights_in);
  const OptionalTensor quality = contiguous_floats(op, "quality", quality_in);
  const MaskArgument row_mask(row_mask_in), mask(mask_in);
  Tensor indices = new_empty(similarity, {batch, k}, ScalarType::Long);
  Tensor gains = new_empty(similarity, {batch, k}, ScalarType::Float);
  Tensor counts = new_empty(similarity, {batch}, ScalarType::Long);
  const CoverageProblem problem{similarity.const_data_ptr(),
                                similarity.stride(0),
                                similarity.stride(1),
                                row_weights ? row_weights->const_data_ptr<float>() : nullptr,
                                quality ? quality->const_data_ptr<float>() : nullptr,
                                row_mask.data(),
                                row_mask.stride(),
                                mask.data(),
                                mask.stride(),
                                batch,
                                similarity.size(1),
                                similarity.size(2),
                                k,
                                indices.mutable_data_ptr<int64_t>(),
                                gains.mutable_data_ptr<float>(),
                                counts.mutable_data_ptr<int64_t>()};
  const CoveragePlan plan = plan_coverage(problem, cuda.limits());
  Tensor floats = new_empty(similarity, {plan.floats()}, ScalarType::Float);
  const cudaError_t status = dispatch_storage(similarity, [&](auto tag) {
    return launch_coverage<typename decltype(tag)::type>(problem, plan, floats.mutable_data_ptr<float>(),
                                                         cuda.stream());
  });
  check_launch(op, status, {{"similarity", similarity}});
  return {indices, gains, counts};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "coverage_sample", coverage_sample); }

}  // namespace tokenprune
