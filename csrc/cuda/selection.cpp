// CUDA bindings of the selection ops: checks, allocation, launch.
#include "tokenprune/selection.h"

#include <tuple>

#include "cuda/binding.h"
#include "tokenprune/selection_grouped.h"

namespace tokenprune {

namespace {

struct Selected {
  Selected(const Tensor& like, int64_t k)
      : indices(new_empty(like, {like.size(0), k}, ScalarType::Long)),
        counts(new_empty(like, {like.size(0)}, ScalarType::Long)) {}
  std::tuple<Tensor, Tensor> result() const { return {indices, counts}; }

  Tensor indices, counts;
};

void check_tokens(const char* op, const char* name, const Tensor& t) {
  if (t.size(1) > kSelectMaxTokens) fail(op, name, "have fewer than 2^31 tokens on a GPU", t.size(1));
}

std::tuple<Tensor, Tensor> select(const char* op, const Tensor& scores_in, const Tensor* num_low, const Tensor* budgets,
                                  int64_t k, const OptionalTensor& mask_in, bool largest) {
  check_not_float64(op, {{"scores", scores_in}});
  check_tokens(op, "scores", scores_in);
  const CudaScope cuda(scores_in);
  const Tensor scores = with_contiguous_rows(scores_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = scores.size(0), n = scores.size(1);
  const Selected selected(scores, k);
  const SelectProblem problem{scores.const_data_ptr(),
                              scores.stride(0),
                              mask.data(),
                              mask.stride(),
                              num_low != nullptr ? num_low->const_data_ptr<int64_t>() : nullptr,
                              num_low != nullptr ? num_low->stride(0) : 0,
                              budgets != nullptr ? budgets->const_data_ptr<int64_t>() : nullptr,
                              budgets != nullptr ? budgets->stride(0) : 0,
                              selected.indices.mutable_data_ptr<int64_t>(),
                              selected.counts.mutable_data_ptr<int64_t>(),
                              batch,
                              n,
                              k,
                              largest};
  const SelectPlan plan = plan_select(batch, n, cuda.limits());
  const cudaError_t status = dispatch_storage(
      scores, [&](auto tag) { return launch_select<typename decltype(tag)::type>(problem, plan, cuda.stream()); });
  check_launch(op, status, {{"scores", scores}});
  return selected.result();
}

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, int64_t k, const OptionalTensor& mask, bool largest,
                                       const OptionalTensor& budgets) {
  check_select_topk(scores, k, mask, largest, budgets);
  return select("select_topk", scores, nullptr, budgets ? &*budgets : nullptr, k, mask, largest);
}

std::tuple<Tensor, Tensor> select_two_tailed(const Tensor& scores, const Tensor& num_low, int64_t k,
                                             const OptionalTensor& mask) {
  check_select_two_tailed(scores, num_low, k, mask);
  return select("select_two_tailed", scores, &num_low, nullptr, k, mask, true);
}

std::tuple<Tensor, Tensor> select_grouped_topk(const Tensor& scores_in, const Tensor& groups_in,
                                               const Tensor& budgets_in, int64_t k, const OptionalTensor& mask_in,
                                               bool largest) {
  const char* op = "select_grouped_topk";
  check_select_grouped_topk(scores_in, groups_in, budgets_in, k, mask_in, largest);
  check_not_float64(op, {{"scores", scores_in}});
  check_tokens(op, "scores", scores_in);
  if (budgets_in.size(1) > kGroupedMaxGroups)
    fail(op, "budgets", "have fewer than 2^31 groups on a GPU", budgets_in.size(1));
  const CudaScope cuda(scores_in);
  const Tensor scores = with_contiguous_rows(scores_in), groups = with_contiguous_rows(groups_in);
  const Tensor budgets = with_contiguous_rows(budgets_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = scores.size(0), n = scores.size(1), group_count = budgets.size(1);
  const Selected selected(scores, k);
  const GroupedPlan plan = plan_grouped(batch, n, group_count, cuda.limits());
  Tensor workspace = new_empty(scores, {batch * plan.workspace_bytes()}, ScalarType::Byte);
  const GroupedProblem problem{scores.const_data_ptr(),
                               scores.stride(0),
                               groups.const_data_ptr<int64_t>(),
                               groups.stride(0),
                               budgets.const_data_ptr<int64_t>(),
                               budgets.stride(0),
                               mask.data(),
                               mask.stride(),
                               selected.indices.mutable_data_ptr<int64_t>(),
                               selected.counts.mutable_data_ptr<int64_t>(),
                               batch,
                               n,
                               group_count,
                               k,
                               largest,
                               workspace.mutable_data_ptr()};
  const cudaError_t status = dispatch_storage(scores, [&](auto tag) {
    return launch_select_grouped<typename decltype(tag)::type>(problem, plan, cuda.stream());
  });
  check_launch(op, status, {{"scores", scores}, {"budgets", budgets}});
  return selected.result();
}

std::tuple<Tensor, Tensor> mask_to_indices(const Tensor& mask_in, int64_t capacity) {
  const char* op = "mask_to_indices";
  check_mask_to_indices(mask_in, capacity);
  check_tokens(op, "mask", mask_in);
  const CudaScope cuda(mask_in);
  const Tensor mask = with_contiguous_rows(mask_in);
  const int64_t batch = mask.size(0), n = mask.size(1);
  const Selected selected(mask, capacity);
  const MaskProblem problem{mask_bytes(mask),
                            mask.stride(0),
                            selected.indices.mutable_data_ptr<int64_t>(),
                            selected.counts.mutable_data_ptr<int64_t>(),
                            batch,
                            n,
                            capacity};
  const cudaError_t status = launch_mask_to_indices(problem, plan_mask(batch, n, cuda.limits()), cuda.stream());
  check_launch(op, status, {{"mask", mask}});
  return selected.result();
}

Tensor score_entropy(const Tensor& scores_in, const OptionalTensor& mask_in, bool normalized) {
  const char* op = "score_entropy";
  check_score_entropy(scores_in, mask_in, normalized);
  check_not_float64(op, {{"scores", scores_in}});
  check_tokens(op, "scores", scores_in);
  const CudaScope cuda(scores_in);
  const Tensor scores = with_contiguous_rows(scores_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = scores.size(0), n = scores.size(1);
  Tensor entropy = new_empty(scores, {batch}, ScalarType::Float);
  const EntropyProblem problem{scores.const_data_ptr(),
                               scores.stride(0),
                               mask.data(),
                               mask.stride(),
                               entropy.mutable_data_ptr<float>(),
                               batch,
                               n,
                               normalized};
  const cudaError_t status = dispatch_storage(
      scores, [&](auto tag) { return launch_score_entropy<typename decltype(tag)::type>(problem, cuda.stream()); });
  check_launch(op, status, {{"scores", scores}});
  return entropy;
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) {
  TOKENPRUNE_IMPL(m, "select_topk", select_topk);
  TOKENPRUNE_IMPL(m, "select_grouped_topk", select_grouped_topk);
  TOKENPRUNE_IMPL(m, "select_two_tailed", select_two_tailed);
  TOKENPRUNE_IMPL(m, "mask_to_indices", mask_to_indices);
  TOKENPRUNE_IMPL(m, "score_entropy", score_entropy);
}

}  // namespace tokenprune
