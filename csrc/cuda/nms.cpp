// CUDA binding of spatial_semantic_nms: checks, plan, allocation, launch.
#include "tokenprune/nms.h"

#include <tuple>

#include "cuda/binding.h"

namespace tokenprune {

namespace {

FloatRows float_rows(const Tensor& t) {
  const FloatType type = t.scalar_type() == ScalarType::Half       ? FloatType::kFloat16
                         : t.scalar_type() == ScalarType::BFloat16 ? FloatType::kBfloat16
                                                                   : FloatType::kFloat32;
  return {t.const_data_ptr(), type, t.stride(0), t.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> spatial_semantic_nms(const Tensor& scores_in, const Tensor& features_in,
                                                        const Tensor& positions_in, int64_t k,
                                                        const OptionalTensor& groups_in, const OptionalTensor& mask_in,
                                                        double radius, double sigma_spatial, double sigma_semantic,
                                                        std::string mode, double threshold) {
  const char* op = "spatial_semantic_nms";
  const bool hard = check_spatial_semantic_nms(scores_in, features_in, positions_in, k, groups_in, mask_in, radius,
                                               sigma_spatial, sigma_semantic, mode, threshold)
                        .mode == 1;
  check_not_float64(op, {{"scores", scores_in}, {"features", features_in}, {"positions", positions_in}});
  const int64_t batch = scores_in.size(0), n = scores_in.size(1), dim = features_in.size(2);
  check_greedy_tokens(op, "scores", n);
  const CudaScope cuda(scores_in);
  const Tensor scores = with_contiguous_rows(scores_in), features = with_contiguous_rows(features_in);
  const Tensor positions = with_contiguous_rows(positions_in);
  const OptionalTensor groups = with_contiguous_rows(groups_in);
  const MaskArgument mask(mask_in);
  Tensor indices = new_empty(scores, {batch, k}, ScalarType::Long);
  Tensor selected = new_empty(scores, {batch, k}, ScalarType::Float);
  Tensor counts = new_empty(scores, {batch}, ScalarType::Long);
  const double reach = std::min(radius, 6 * sigma_spatial);  // from there on the spatial factor rounds away
  const NmsPlan plan = plan_nms(batch, n, dim, static_cast<int64_t>(features.element_size()), k, reach, cuda.limits());
  Tensor workspace = new_empty(scores, {ceil_div<int64_t>(plan.workspace, 8)}, ScalarType::Long);
  const NmsProblem problem{float_rows(scores),
                           float_rows(positions),
                           features.const_data_ptr(),
                           features.stride(0),
                           features.stride(1),
                           groups ? groups->const_data_ptr<int64_t>() : nullptr,
                           groups ? groups->stride(0) : 0,
                           mask.data(),
                           mask.stride(),
                           batch,
                           n,
                           dim,
                           k,
                           nms_suppression(radius, sigma_spatial, sigma_semantic, threshold, hard),
                           workspace.mutable_data_ptr(),
                           indices.mutable_data_ptr<int64_t>(),
                           selected.mutable_data_ptr<float>(),
                           counts.mutable_data_ptr<int64_t>()};
  const cudaError_t status = dispatch_storage(features, [&](auto tag) {
    return launch_spatial_semantic_nms<typename decltype(tag)::type>(problem, plan, cuda.stream());
  });
  check_launch(op, status, {{"scores", scores}, {"features", features}, {"positions", positions}});
  return {indices, selected, counts};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "spatial_semantic_nms", spatial_semantic_nms); }

}  // namespace tokenprune
