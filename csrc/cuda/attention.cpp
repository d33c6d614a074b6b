// CUDA bindings of attention_scores and cross_attention_scores: the column pass, after the row pass or from a given
// lse.
#include "cuda/attention_inputs.h"
#include "tokenprune/attention_columns.h"

namespace tokenprune {

namespace {

// Scores from lse [B, Hq, M], which is float32 and contiguous: given, or what the row pass `rows` writes.
Tensor run_attention_columns(const char* op, const AttentionInputs& inputs, const Tensor& lse, const RowPass* rows,
                             const OptionalTensor& key_indices_in, const OptionalTensor& query_mask_in,
                             const AttentionReductions& reductions, const CudaScope& cuda) {
  const AttentionProblem& p = inputs.problem;
  const OptionalTensor key_indices = with_contiguous_rows(key_indices_in);
  const MaskArgument query_mask(query_mask_in);
  const auto heads = static_cast<ColumnHeads>(reductions.heads);
  const auto kinds = static_cast<int64_t>(reductions.rows.size());
  const bool last_only = std::all_of(reductions.rows.begin(), reductions.rows.end(),
                                     [](QueryReduction rows) { return rows == QueryReduction::kLast; });
  const int64_t columns = key_indices ? key_indices->size(1) : p.keys;
  const bool per_head = heads == ColumnHeads::kNone, every_row = reductions.every_row();
  Tensor scores = new_empty(inputs.query, scores_shape(inputs.query, reductions, columns), ScalarType::Float);
  const bool one_launch = rows != nullptr && rows->plan.launches() > 1;  // three launches in all
  const ColumnPlan plan = plan_attention_columns(
      {p.batch, p.query_heads, p.key_heads, p.rows, p.dim, columns, static_cast<int>(inputs.query.element_size()),
       per_head, every_row, last_only, one_launch},
      cuda.limits());
  OptionalTensor partial;
  if (plan.combine)
    partial = new_empty(inputs.query, {plan.partial_elements(p.batch, per_head ? p.query_heads : 1, columns)},
                        ScalarType::Float);
  ColumnProblem c{p,
                  lse.const_data_ptr<float>(),
                  key_indices ? key_indices->const_data_ptr<int64_t>() : nullptr,
                  key_indices ? key_indices->stride(0) : 0,
                  columns,
                  query_mask.data(),
                  query_mask.stride(),
                  heads,
                  every_row,
                  last_only,
                  0,
                  0,
                  0,
                  kinds,
                  scores.mutable_data_ptr<float>(),
                  partial ? partial->mutable_data_ptr<float>() : nullptr};
  const cudaError_t status = dispatch_storage(inputs.query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cudaError_t status = rows != nullptr ? rows->status : launch_norms_of<T>(inputs, cuda);
    if (every_row) return status != cudaSuccess ? status : launch_attention_every_row<T>(c, plan, cuda.stream());
    for (; status == cudaSuccess && c.first_kind < kinds; c.first_kind += kMaxKinds) {
      c.kind_count = static_cast<int>(std::min<int64_t>(kMaxKinds, kinds - c.first_kind));
      c.kinds = 0;
      for (int r = 0; r < c.kind_count; ++r)
        c.kinds |= static_cast<uint64_t>(reductions.rows[c.first_kind + r]) << 2 * r;
      status = launch_attention_columns<T>(c, plan, cuda.stream());
    }
    return status;
  });
  check_launch(op, status, {{"query", inputs.query}, {"key", inputs.key}});
  return scores;
}

// What the general checks leave over.
void check_values(const char* op, const Tensor& query, const Tensor& key, const OptionalTensor& key_indices) {
  check_not_float64(op, {{"query", query}});
  if (key_indices) check_indices(op, "key_indices", *key_indices, key.size(2));
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_scores(
    const Tensor& query, const Tensor& key, const OptionalTensor& key_indices, const OptionalTensor& query_mask,
    const OptionalTensor& key_mask, const OptionalTensor& query_positions, std::optional<double> scale, bool causal,
    bool cosine, std::string head_reduction, std::string query_reduction) {
  const char* op = "cross_attention_scores";
  const AttentionReductions reductions =
      reductions_of(check_cross_attention_scores(query, key, key_indices, query_mask, key_mask, query_positions, scale,
                                                 causal, cosine, head_reduction, query_reduction));
  check_values(op, query, key, key_indices);
  const CudaScope cuda(query);
  const AttentionInputs inputs(query, key, key_mask, query_positions, scale, causal, cosine);
  const RowPass rows = run_attention_rows(inputs, cuda);
  Tensor scores = run_attention_columns(op, inputs, rows.lse, &rows, key_indices, query_mask, reductions, cuda);
  return {scores, rows.entropy, rows.lse};
}

Tensor attention_scores(const Tensor& query, const Tensor& key, const Tensor& lse, const OptionalTensor& key_indices,
                        const OptionalTensor& query_mask, const OptionalTensor& key_mask,
                        const OptionalTensor& query_positions, std::optional<double> scale, bool causal, bool cosine,
                        std::string head_reduction, std::string query_reduction) {
  const char* op = "attention_scores";
  const AttentionReductions reductions =
      reductions_of(check_attention_scores(query, key, lse, key_indices, query_mask, key_mask, query_positions, scale,
                                           causal, cosine, head_reduction, query_reduction));
  check_values(op, query, key, key_indices);
  const CudaScope cuda(query);
  const AttentionInputs inputs(query, key, key_mask, query_positions, scale, causal, cosine);
  return run_attention_columns(op, inputs, contiguous_as(lse, ScalarType::Float), nullptr, key_indices, query_mask,
                               reductions, cuda);
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) {
  TOKENPRUNE_IMPL(m, "cross_attention_scores", cross_attention_scores);
  TOKENPRUNE_IMPL(m, "attention_scores", attention_scores);
}

}  // namespace tokenprune
