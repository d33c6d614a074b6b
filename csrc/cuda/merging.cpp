// CUDA binding of merge_tokens: checks, allocation, launches.
#include "tokenprune/merging.h"

#include <tuple>
#include <vector>

#include "cuda/binding.h"

namespace tokenprune {

namespace {

constexpr const char* kOp = "merge_tokens";

// Who joins which target, launched and not checked yet: the means depend on these launches, and what they read lives until
// the last one is checked.
struct Assignment {
  Tensor joined;  // [batch, n]
  cudaError_t status;
  std::vector<Tensor> read;
};

Assignment assign(const Tensor& keys_in, const Tensor& targets_in, const OptionalTensor& mask_in,
                  std::optional<double> threshold, bool euclidean, bool include_targets, const CudaScope& cuda) {
  const Tensor keys = with_contiguous_rows(keys_in), targets = with_contiguous_rows(targets_in);
  const MaskArgument mask(mask_in);
  const int64_t batch = keys.size(0), n = keys.size(1), channels = keys.size(2);
  Tensor assignment = new_empty(keys, {batch, n}, ScalarType::Long);
  if (batch * n == 0) return {assignment, cudaSuccess, {}};
  Tensor norms = new_empty(keys, {batch, n}, ScalarType::Float);
  const float limit = static_cast<float>(threshold.value_or(0));
  const AssignProblem problem{keys.const_data_ptr(),
                              keys.stride(0),
                              keys.stride(1),
                              rows_start_aligned(keys),
                              targets.const_data_ptr<int64_t>(),
                              targets.stride(0),
                              mask.data(),
                              mask.stride(),
                              euclidean,
                              include_targets,
                              threshold.has_value(),
                              euclidean ? -limit : limit,
                              batch,
                              n,
                              channels,
                              targets.size(1),
                              norms.mutable_data_ptr<float>(),
                              assignment.mutable_data_ptr<int64_t>()};
  const AssignPlan plan = plan_assign(batch, n, channels, cuda.limits());
  const cudaError_t status = dispatch_storage(
      keys, [&](auto tag) { return launch_assign<typename decltype(tag)::type>(problem, plan, cuda.stream()); });
  Assignment result{assignment, status, {keys, targets, norms}};
  if (mask.tensor) result.read.push_back(*mask.tensor);
  return result;
}

Assignment copy_assignment(const Tensor& given_in, int64_t slots, const CudaScope& cuda) {
  const Tensor given = with_contiguous_rows(given_in);
  const int64_t batch = given.size(0), n = given.size(1);
  Tensor assignment = new_empty(given, {batch, n}, ScalarType::Long);
  const cudaError_t status = launch_copy_assignment(given.const_data_ptr<int64_t>(), given.stride(0), batch, n, slots,
                                                    assignment.mutable_data_ptr<int64_t>(), cuda.stream());
  return {assignment, status, {given}};
}

std::tuple<Tensor, Tensor, Tensor> merge_tokens(const Tensor& values_in, const Tensor& targets,
                                                const OptionalTensor& keys, const OptionalTensor& given,
                                                const OptionalTensor& weights_in, const OptionalTensor& mask,
                                                std::optional<double> threshold, std::string metric,
                                                bool include_targets) {
  const bool euclidean =
      check_merge_tokens(values_in, targets, keys, given, weights_in, mask, threshold, metric, include_targets)
          .metric == 1;
  check_not_float64(kOp, {{"values", values_in}});
  if (keys) check_not_float64(kOp, {{"keys", *keys}});
  const int64_t batch = values_in.size(0), n = values_in.size(1), slots = targets.size(1);
  if (n > kMergeMostTokens) fail(kOp, "values", "have fewer than 2^31 tokens on a GPU", n);
  check_indices(kOp, "targets", targets, n);
  if (given) check_indices(kOp, "assignment", *given, slots);
  const CudaScope cuda(values_in);
  const Tensor values = with_contiguous_rows(values_in);
  const OptionalTensor weights = contiguous_floats(kOp, "weights", weights_in);
  const Assignment assignment =
      given ? copy_assignment(*given, slots, cuda)
            : assign(keys ? *keys : values, targets, mask, threshold, euclidean, include_targets, cuda);
  Tensor merged = new_empty(values, {batch, slots, values.size(2)}, values.scalar_type());
  Tensor sizes = new_empty(values, {batch, slots}, ScalarType::Float);
  const bool aligned = rows_start_aligned(values) && values.size(2) * values.element_size() % 16 == 0;
  const MeanProblem problem{values.const_data_ptr(),
                            values.stride(0),
                            values.stride(1),
                            aligned,
                            weights ? weights->const_data_ptr<float>() : nullptr,
                            assignment.joined.const_data_ptr<int64_t>(),
                            batch,
                            n,
                            values.size(2),
                            slots,
                            merged.mutable_data_ptr(),
                            sizes.mutable_data_ptr<float>()};
  cudaError_t status = assignment.status;
  if (status == cudaSuccess)
    status = dispatch_storage(
        values, [&](auto tag) { return launch_means<typename decltype(tag)::type>(problem, cuda.stream()); });
  check_launch(kOp, status, {{"values", values}, {"targets", targets}});
  return {merged, sizes, assignment.joined};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "merge_tokens", merge_tokens); }

}  // namespace tokenprune
