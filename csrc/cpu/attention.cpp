// CPU kernels of the attention ops.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/attention_run.h"
#include "cpu/capability.h"
#include "op.h"

namespace tokenprune {

TOKENPRUNE_TABLE(AttentionKernels<float>, attention_f32)
TOKENPRUNE_TABLE(AttentionKernels<double>, attention_f64)
TOKENPRUNE_TABLE(AttentionKernels<Half>, attention_f16)
TOKENPRUNE_TABLE(AttentionKernels<BFloat16>, attention_bf16)

template <class T>
const AttentionKernels<T>& attention_kernels() {
  if constexpr (std::is_same_v<T, float>) return TOKENPRUNE_CHOOSE(attention_f32);
  if constexpr (std::is_same_v<T, double>) return TOKENPRUNE_CHOOSE(attention_f64);
  if constexpr (std::is_same_v<T, Half>) return TOKENPRUNE_CHOOSE(attention_f16);
  if constexpr (std::is_same_v<T, BFloat16>) return TOKENPRUNE_CHOOSE(attention_bf16);
}

namespace {

template <class A>
void fill(const std::optional<Tensor>& t, A value) {
  if (t) std::fill_n(static_cast<A*>(t->mutable_data_ptr()), t->numel(), value);
}

// Fills the outputs of a call whose arguments were checked and, except for the outputs, stored in it.
void compute(AttentionCall& call, bool scores) {
  AttentionShape shape{call.query.size(0),
                       call.query.size(1),
                       call.key.size(1),
                       call.query.size(2),
                       call.key.size(2),
                       call.query.size(3),
                       0,
                       0,
                       scores,
                       call.reductions.heads == HeadReduction::kNone};
  const ScalarType wide = wide_type(call.query);
  shape.element_size = call.query.element_size();
  shape.wide_size = wide == ScalarType::Double ? 8 : 4;
  if (!call.lse_in) {
    call.entropy = new_empty(call.query, {shape.batch, shape.query_heads, shape.rows}, wide);
    call.lse = new_empty(call.query, {shape.batch, shape.query_heads, shape.rows}, wide);
  }
  if (scores) {
    const int64_t columns = call.key_indices ? call.key_indices->size(1) : shape.keys;
    call.scores = new_empty(call.query, scores_shape(call.query, call.reductions, columns), wide);
  }
  dispatch_floating(call.query.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    if (shape.batch > 0 && shape.query_heads > 0 && shape.rows > 0 && shape.keys > 0) {
      AttentionRun<T>(call, shape).run();
      return;
    }
    fill<A>(call.scores, 0);
    fill<A>(call.entropy, 0);
    fill<A>(call.lse, -std::numeric_limits<A>::infinity());
  });
}

// From checked arguments.
AttentionCall prepare(const char* op, const Tensor& query, const Tensor& key, const OptionalTensor& lse,
                      const OptionalTensor& key_indices, const OptionalTensor& query_mask,
                      const OptionalTensor& key_mask, const OptionalTensor& query_positions,
                      std::optional<double> scale, bool causal, bool cosine, AttentionReductions reductions) {
  AttentionCall call{with_contiguous_rows(query),
                     with_contiguous_rows(key),
                     with_contiguous_rows(key_indices),
                     with_contiguous_rows(query_mask),
                     with_contiguous_rows(key_mask),
                     causal ? with_contiguous_rows(query_positions) : std::nullopt,
                     std::nullopt,
                     std::nullopt,
                     std::nullopt,
                     std::nullopt,
                     0,
                     causal,
                     cosine,
                     std::move(reductions)};
  call.scale = scale ? *scale : cosine ? 1.0 : 1 / std::sqrt(static_cast<double>(query.size(3)));
  if (lse) call.lse_in = contiguous_as(*lse, wide_type(query));
  if (call.key_indices) check_index_values(op, "key_indices", *call.key_indices, key.size(2));
  return call;
}

std::tuple<Tensor, Tensor, Tensor> cross_attention_scores(
    const Tensor& query, const Tensor& key, const OptionalTensor& key_indices, const OptionalTensor& query_mask,
    const OptionalTensor& key_mask, const OptionalTensor& query_positions, std::optional<double> scale, bool causal,
    bool cosine, std::string head_reduction, std::string query_reduction) {
  const auto choices = check_cross_attention_scores(query, key, key_indices, query_mask, key_mask, query_positions,
                                                    scale, causal, cosine, head_reduction, query_reduction);
  AttentionCall call = prepare("cross_attention_scores", query, key, std::nullopt, key_indices, query_mask, key_mask,
                               query_positions, scale, causal, cosine, reductions_of(choices));
  compute(call, true);
  return {*call.scores, *call.entropy, *call.lse};
}

std::tuple<Tensor, Tensor> attention_entropy(const Tensor& query, const Tensor& key, const OptionalTensor& key_mask,
                                             const OptionalTensor& query_positions, std::optional<double> scale,
                                             bool causal, bool cosine) {
  check_attention_entropy(query, key, key_mask, query_positions, scale, causal, cosine);
  AttentionCall call = prepare("attention_entropy", query, key, std::nullopt, std::nullopt, std::nullopt, key_mask,
                               query_positions, scale, causal, cosine, {HeadReduction::kMean, {QueryReduction::kMean}});
  compute(call, false);
  return {*call.entropy, *call.lse};
}

Tensor attention_scores(const Tensor& query, const Tensor& key, const Tensor& lse, const OptionalTensor& key_indices,
                        const OptionalTensor& query_mask, const OptionalTensor& key_mask,
                        const OptionalTensor& query_positions, std::optional<double> scale, bool causal, bool cosine,
                        std::string head_reduction, std::string query_reduction) {
  const auto choices = check_attention_scores(query, key, lse, key_indices, query_mask, key_mask, query_positions,
                                              scale, causal, cosine, head_reduction, query_reduction);
  AttentionCall call = prepare("attention_scores", query, key, lse, key_indices, query_mask, key_mask, query_positions,
                               scale, causal, cosine, reductions_of(choices));
  compute(call, true);
  return *call.scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  TOKENPRUNE_IMPL(m, "cross_attention_scores", cross_attention_scores);
  TOKENPRUNE_IMPL(m, "attention_entropy", attention_entropy);
  TOKENPRUNE_IMPL(m, "attention_scores", attention_scores);
}

}  // namespace tokenprune
