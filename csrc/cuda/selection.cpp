// CUDA bindings of the selection ops: checks, allocation, launch.
#include "tokenprune/selection.h"

#include "args/selection.h"
#include "cuda/binding.h"

namespace tokenprune {

namespace {

Tensor score_entropy(const Tensor& scores_in, const OptionalTensor& mask_in, bool normalized) {
  const char* op = "score_entropy";
  check_score_entropy(scores_in, mask_in);
  check_not_float64(op, {{"scores", scores_in}});
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

TOKENPRUNE_CUDA_OPS(m) { m.impl("score_entropy", TORCH_BOX(&score_entropy)); }

}  // namespace tokenprune
