// CUDA binding of attention_entropy: the row pass alone.
#include "cuda/attention_inputs.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor> attention_entropy(const Tensor& query, const Tensor& key, const OptionalTensor& key_mask,
                                             const OptionalTensor& query_positions, std::optional<double> scale,
                                             bool causal, bool cosine) {
  const char* op = "attention_entropy";
  check_attention_entropy(query, key, key_mask, query_positions, scale, causal, cosine);
  check_not_float64(op, {{"query", query}});
  const CudaScope cuda(query);
  const AttentionInputs inputs(query, key, key_mask, query_positions, scale, causal, cosine);
  const RowPass rows = run_attention_rows(inputs, cuda);
  check_launch(op, rows.status, {{"query", query}, {"key", key}});
  return {rows.entropy, rows.lse};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "attention_entropy", attention_entropy); }

}  // namespace tokenprune
