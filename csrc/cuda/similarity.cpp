// CUDA bindings of the similarity ops: checks, allocation, launch.
#include "tokenprune/similarity.h"

#include "cuda/binding.h"
#include "tokenprune/similarity_paired.h"

namespace tokenprune {

namespace {

// Rows [B, n, C] of which 16 bytes at a time may be read, at offsets that 32 bits count.
bool rows_are_aligned(const Tensor& t) {
  const auto size = static_cast<int64_t>(t.element_size());
  const auto whole = [&](int64_t elements) { return elements * size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && whole(t.stride(0)) && whole(t.stride(1)) &&
         whole(t.size(2)) && t.size(1) * t.stride(1) * size / 16 < int64_t(1) << 32;
}

RowList masked_rows(const Tensor& queries, const MaskArgument& mask) {
  return {queries.const_data_ptr(),
          queries.stride(0),
          queries.stride(1),
          queries.size(1),
          nullptr,
          0,
          mask.data(),
          mask.stride(),
          queries.size(1)};
}

RowList rows_at(const Tensor& features, const Tensor& indices) {
  return {features.const_data_ptr(),
          features.stride(0),
          features.stride(1),
          features.size(1),
          indices.const_data_ptr<int64_t>(),
          indices.stride(0),
          nullptr,
          0,
          indices.size(1)};
}

// scores[b, j] = max over best_of of the cosines + sign * mean over mean_of; an empty list contributes 0.
Tensor score(const char* op, const Tensor& features, const RowList& best_of, const RowList& mean_of, float sign,
             bool aligned, const CudaScope& cuda, std::initializer_list<NamedTensor> inputs) {
  const int64_t batch = features.size(0), n = features.size(1), dim = features.size(2);
  Tensor scores = new_empty(features, {batch, n}, ScalarType::Float);
  if (batch * n == 0) return scores;
  const SimilarityPlan plan = plan_similarity(batch, n, dim, static_cast<int>(features.element_size()), best_of.length,
                                              mean_of.length, cuda.limits());
  Tensor workspace = new_empty(features, {plan.workspace()}, ScalarType::Float);
  const SimilarityProblem problem{features.const_data_ptr(),
                                  features.stride(0),
                                  features.stride(1),
                                  batch,
                                  n,
                                  dim,
                                  best_of,
                                  mean_of,
                                  sign,
                                  aligned,
                                  scores.mutable_data_ptr<float>(),
                                  workspace.mutable_data_ptr<float>()};
  const cudaError_t status = dispatch_storage(features, [&](auto tag) {
    return launch_similarity<typename decltype(tag)::type>(problem, plan, cuda.stream());
  });
  check_launch(op, status, inputs);
  return scores;
}

Tensor cosine_scores(const Tensor& features_in, const Tensor& queries_in, const OptionalTensor& query_mask,
                     std::string reduction) {
  const char* op = "cosine_scores";
  const bool mean = check_cosine_scores(features_in, queries_in, query_mask, reduction).reduction == 1;
  check_not_float64(op, {{"features", features_in}});
  const CudaScope cuda(features_in);
  const Tensor features = with_contiguous_rows(features_in), queries = with_contiguous_rows(queries_in);
  const MaskArgument mask(query_mask);
  const RowList listed = masked_rows(queries, mask), none{};
  const bool aligned = rows_are_aligned(features) && rows_are_aligned(queries);
  return score(op, features, mean ? none : listed, mean ? listed : none, 1, aligned, cuda,
               {{"features", features}, {"queries", queries}});
}

Tensor contrastive_scores(const Tensor& features_in, const Tensor& anchors_in, const Tensor& references_in) {
  const char* op = "contrastive_scores";
  check_contrastive_scores(features_in, anchors_in, references_in);
  check_not_float64(op, {{"features", features_in}});
  check_indices(op, "anchor_indices", anchors_in, features_in.size(1));
  check_indices(op, "reference_indices", references_in, features_in.size(1));
  const CudaScope cuda(features_in);
  const Tensor features = with_contiguous_rows(features_in);
  const Tensor anchors = with_contiguous_rows(anchors_in), references = with_contiguous_rows(references_in);
  return score(op, features, rows_at(features, anchors), rows_at(features, references), -1, rows_are_aligned(features),
               cuda, {{"features", features}, {"anchor_indices", anchors}, {"reference_indices", references}});
}

Tensor paired_cosine(const Tensor& a_in, const Tensor& b_in) {
  const char* op = "paired_cosine";
  check_paired_cosine(a_in, b_in);
  check_not_float64(op, {{"a", a_in}});
  const CudaScope cuda(a_in);
  const Tensor a = with_contiguous_rows(a_in), b = with_contiguous_rows(b_in);
  const int64_t batch = a.size(0), n = a.size(1), dim = a.size(2);
  Tensor scores = new_empty(a, {batch, n}, ScalarType::Float);
  const PairedProblem problem{{a.const_data_ptr(), a.stride(0), a.stride(1)},
                              {b.const_data_ptr(), b.stride(0), b.stride(1)},
                              batch,
                              n,
                              dim,
                              rows_are_aligned(a) && rows_are_aligned(b),
                              scores.mutable_data_ptr<float>()};
  const PairedPlan plan = plan_paired(batch, n, dim, static_cast<int>(a.element_size()), cuda.limits());
  const cudaError_t status = dispatch_storage(
      a, [&](auto tag) { return launch_paired_cosine<typename decltype(tag)::type>(problem, plan, cuda.stream()); });
  check_launch(op, status, {{"a", a}, {"b", b}});
  return scores;
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) {
  TOKENPRUNE_IMPL(m, "cosine_scores", cosine_scores);
  TOKENPRUNE_IMPL(m, "contrastive_scores", contrastive_scores);
  TOKENPRUNE_IMPL(m, "paired_cosine", paired_cosine);
}

}  // namespace tokenprune
