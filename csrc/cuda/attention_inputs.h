// What the bindings of the attention ops share: the problem, constructed from tensors that check_attention_scores or a
// sibling has passed, with the inverse norms, and the row pass.
#pragma once

#include <cmath>

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
    const int64_t batch = query.size(0), query_heads = query.size(1), key_heads = key.size(1);
    const int64_t rows = query.size(2), keys = key.size(2), dim = query.size(3), element = query.element_size();
    if (query_heads > key_heads && key_heads > 0 && query_heads / key_heads * rows >= int64_t(1) << 31)
      fail("attention", "query", "have fewer than 2^31 rows per key head", query_heads / key_heads * rows);
    if (causal && query_positions) positions = with_contiguous_rows(*query_positions);
    const int64_t queries = batch * query_heads * rows;
    if (cosine) norms = new_empty(query, {queries + batch * key_heads * keys}, ScalarType::Float);
    float* inverse_norms = norms ? norms->mutable_data_ptr<float>() : nullptr;
    const void* query_data = query.const_data_ptr();
    // Without keys there is no memory of theirs; copies of zeros name an address all the same.
    const void* key_data = keys == 0 ? query_data : key.const_data_ptr();
    const VectorStrides query_strides = strides_of(query), key_strides = strides_of(key);
    problem = {query_data,
               key_data,
               query_strides,
               key_strides,
               vectors_are_aligned(query_data, query_strides, dim, element),
               vectors_are_aligned(key_data, key_strides, dim, element),
               batch,
               query_heads,
               key_heads,
               rows,
               keys,
               dim,
               key_mask.data(),
               key_mask.stride(),
               positions ? positions->const_data_ptr<int64_t>() : nullptr,
               positions ? positions->stride(0) : 0,
               static_cast<float>(scale    ? *scale
                                  : cosine ? 1.0
                                           : 1 / std::sqrt(static_cast<double>(dim))),
               causal,
               cosine,
               inverse_norms,
               cosine ? inverse_norms + queries : nullptr};
  }

 private:
  // Strides of dimensions that have one entry say nothing and must not spoil the alignment.
  static VectorStrides strides_of(const Tensor& t) {
    const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
    return {stride(0), stride(1), stride(2)};
  }
};

// Launches the inverse norms, when the problem has any.
template <class T>
cudaError_t launch_norms_of(const AttentionInputs& inputs, const CudaScope& cuda) {
  return inputs.problem.cosine ? launch_attention_norms<T>(inputs.problem, cuda.stream()) : cudaSuccess;
}

// What the row pass and the inverse norms in front of it, launched and not checked yet, write. The launches behind them
// may depend on them, and the workspace lives until the last one is checked.
struct RowPass {
  AttentionRowPlan plan;
  Tensor entropy, lse;  // [B, Hq, M]
  Tensor workspace;
  cudaError_t status;
};

inline RowPass run_attention_rows(const AttentionInputs& inputs, const CudaScope& cuda) {
  const AttentionProblem& p = inputs.problem;
  const AttentionRowPlan plan = plan_attention_rows(p.batch, p.key_heads, p.group_rows(), p.keys, p.dim,
                                                    static_cast<int>(inputs.query.element_size()), cuda.limits());
  const auto floats = [&](const Shape& shape) { return new_empty(inputs.query, shape, ScalarType::Float); };
  const Shape rows{p.batch, p.query_heads, p.rows};
  RowPass pass{plan, floats(rows), floats(rows), floats({plan.workspace}), cudaSuccess};
  const AttentionRowOutputs out{pass.lse.mutable_data_ptr<float>(), pass.entropy.mutable_data_ptr<float>(),
                                pass.workspace.mutable_data_ptr<float>()};
  pass.status = dispatch_storage(inputs.query, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const cudaError_t status = launch_norms_of<T>(inputs, cuda);
    return status != cudaSuccess ? status : launch_attention_rows<T>(p, plan, out, cuda.stream());
  });
  return pass;
}

}  // namespace tokenprune
