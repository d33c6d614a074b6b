// CUDA binding of select_mixture: checks, allocation, launch.
#include "tokenprune/mixture.h"

#include <cmath>
#include <tuple>

#include "cuda/binding.h"

namespace tokenprune {

namespace {

ScoreRows score_rows(const Tensor& scores) {
  const ScoreType type = dispatch_storage(scores, [](auto tag) {
    using T = typename decltype(tag)::type;
    return std::is_same_v<T, float> ? ScoreType::kFloat
                                    : (std::is_same_v<T, __half> ? ScoreType::kHalf : ScoreType::kBFloat16);
  });
  return {scores.const_data_ptr(), scores.stride(0), type};
}

std::tuple<Tensor, Tensor, Tensor> select_mixture(const Tensor& text_in, const Tensor& visual_in, int64_t k,
                                                  double floor, const OptionalTensor& mask_in) {
  const char* op = "select_mixture";
  check_select_mixture(text_in, visual_in, k, floor, mask_in);
  check_not_float64(op, {{"text_scores", text_in}, {"visual_scores", visual_in}});
  const CudaScope cuda(text_in);
  const Tensor text = with_contiguous_rows(text_in), visual = with_contiguous_rows(visual_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = text.size(0), n = text.size(1);
  if (n > kMixtureMaxTokens) fail(op, "text_scores", "have fewer than 2^31 tokens", n);
  Tensor indices = new_empty(text, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(text, {batch}, ScalarType::Long);
  Tensor num_text = new_empty(text, {batch}, ScalarType::Long);
  const auto reserved = static_cast<int64_t>(std::floor(floor * static_cast<double>(k)));
  const MixturePlan plan = plan_mixture(n, k, reserved, cuda.limits());
  Tensor workspace = new_empty(text, {ceil_div<int64_t>(plan.workspace_bytes(batch), 4)}, ScalarType::Float);
  const MixtureProblem problem{score_rows(text),
                               score_rows(visual),
                               mask.data(),
                               mask.stride(),
                               indices.mutable_data_ptr<int64_t>(),
                               counts.mutable_data_ptr<int64_t>(),
                               num_text.mutable_data_ptr<int64_t>(),
                               batch,
                               n,
                               k,
                               reserved,
                               reinterpret_cast<unsigned char*>(workspace.mutable_data_ptr<float>())};
  check_launch(op, launch_mixture(problem, plan, cuda.stream()), {{"text_scores", text}, {"visual_scores", visual}});
  return {indices, counts, num_text};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "select_mixture", select_mixture); }

}  // namespace tokenprune
