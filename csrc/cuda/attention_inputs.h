// What the bindings of the attention ops share: the problem, constructed from tensors that check_attention_scores or a
// sibling has passed, with the inverse norms, and the row pass.
#pragma once

#include <cmath>
#include <tuple>

#include "args/attention.h"
#include "cuda/binding.h"
#include "tokenprune/attention.h"

namespace tokenprune {

// The tensors that a problem points into, and the problem.
struct AttentionInputs {
  Tensor query, key;
  MaskArgument key_mask;
  OptionalTensor positions, norms;
  AttentionProblem problem;

  AttentionInputs(const Tensor& query_in, const Tensor& key_in, const OptionalTensor& key_mask_in,
                  const OptionalTensor& query_positions, std::optional<double> scale, bool causal, bool cosine)
      : query(with_contiguous_rows(query_in)), key(with_contiguous_rows(key_in)), key_mask(key_mask_in), problem{} {
    AttentionProblem& p = problem;
    p.query = query.const_data_ptr();
    p.key = key.const_data_ptr();
    p.query_strides = strides_of(query);
    p.key_strides = strides_of(key);
    p.batch = query.size(0);
    p.query_heads = query.size(1);
    p.key_heads = key.size(1);
    p.rows = query.size(2);
    p.keys = key.size(2);
    p.dim = query.size(3);
    if (p.group() > 1 && p.group_rows() >= int64_t(1) << 31)
      fail("attention", "query", "have fewer than 2^31 rows per key head", p.group_rows());
    const int64_t element = query.element_size();
    if (p.keys == 0) p.key = p.query;  // without memory of its own; copies of zeros name an address all the same
    p.query_aligned = vectors_are_aligned(p.query, p.query_strides, p.dim, element);
    p.key_aligned = vectors_are_aligned(p.key, p.key_strides, p.dim, element);
    p.key_mask = key_mask.data();
    p.key_mask_stride = key_mask.stride();
    if (causal && query_positions) {
      positions = with_contiguous_rows(*query_positions);
      p.query_positions = positions->const_data_ptr<int64_t>();
      p.query_positions_stride = positions->stride(0);
    }
    p.scale = static_cast<float>(scale ? *scale : cosine ? 1.0 : 1 / std::sqrt(static_cast<double>(p.dim)));
    p.causal = causal;
    p.cosine = cosine;
    if (!cosine) return;
    const int64_t queries = p.batch * p.query_heads * p.rows;
    norms = new_empty(query, {queries + p.batch * p.key_heads * p.keys}, ScalarType::Float);
    p.query_inverse_norms = norms->mutable_data_ptr<float>();
    p.key_inverse_norms = p.query_inverse_norms + queries;
  }

 private:
  // Strides of dimensions that have one entry say nothing and must not spoil the alignment.
  static VectorStrides strides_of(const Tensor& t) {
    const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
    return {stride(0), stride(1), stride(2)};
  }
};

// Launches the inverse norms, when the problem has any.
inline void run_attention_norms(const char* op, const AttentionInputs& inputs, const CudaScope& cuda) {
  if (!inputs.problem.cosine) return;
  const cudaError_t status = dispatch_storage(inputs.query, [&](auto tag) {
    return launch_attention_norms<typename decltype(tag)::type>(inputs.problem, cuda.stream());
  });
  check_launch(op, status, {{"query", inputs.query}, {"key", inputs.key}});
}

// entropy and lse, [B, Hq, M]; the inverse norms are there.
inline std::tuple<Tensor, Tensor> run_attention_rows(const char* op, const AttentionInputs& inputs,
                                                     const CudaScope& cuda) {
  const AttentionProblem& p = inputs.problem;
  Tensor entropy = new_empty(inputs.query, {p.batch, p.query_heads, p.rows}, ScalarType::Float);
  Tensor lse = new_empty(inputs.query, {p.batch, p.query_heads, p.rows}, ScalarType::Float);
  const AttentionRowPlan plan = plan_attention_rows(p.batch, p.key_heads, p.group_rows(), p.keys, p.dim,
                                                    static_cast<int>(inputs.query.element_size()), cuda.limits());
  Tensor workspace = new_empty(inputs.query, {plan.workspace}, ScalarType::Float);
  const AttentionRowOutputs out{lse.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
                                workspace.mutable_data_ptr<float>()};
  const cudaError_t status = dispatch_storage(inputs.query, [&](auto tag) {
    return launch_attention_rows<typename decltype(tag)::type>(p, plan, out, cuda.stream());
  });
  check_launch(op, status, {{"query", inputs.query}, {"key", inputs.key}});
  return {entropy, lse};
}

}  // namespace tokenprune
