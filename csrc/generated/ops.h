// Made by scripts/generate_ops.py from tokenprune_kernels/ops; do not edit.
// The schemas of the ops that have compiled kernels, and the checks of their arguments.
#pragma once
// clang-format off

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "args/attention.h"
#include "checks.h"

namespace tokenprune {

// Defines the ops in a library: torch.ops.tokenprune, or the emulator's namespace.
inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def("attention_entropy(Tensor query, Tensor key, *, Tensor? key_mask=None, Tensor? query_positions=None, float? scale=None, bool causal=False, bool cosine=False) -> (Tensor entropy, Tensor lse)");
  m.def("attention_scores(Tensor query, Tensor key, Tensor lse, *, Tensor? key_indices=None, Tensor? query_mask=None, Tensor? key_mask=None, Tensor? query_positions=None, float? scale=None, bool causal=False, bool cosine=False, str head_reduction=\"mean\", str query_reduction=\"mean\") -> Tensor");
  m.def("contrastive_scores(Tensor features, Tensor anchor_indices, Tensor reference_indices) -> Tensor");
  m.def("cosine_scores(Tensor features, Tensor queries, *, Tensor? query_mask=None, str reduction=\"max\") -> Tensor");
  m.def("coverage_sample(Tensor similarity, SymInt k, *, Tensor? row_weights=None, Tensor? quality=None, Tensor? row_mask=None, Tensor? mask=None) -> (Tensor indices, Tensor gains, Tensor counts)");
  m.def("cross_attention_scores(Tensor query, Tensor key, *, Tensor? key_indices=None, Tensor? query_mask=None, Tensor? key_mask=None, Tensor? query_positions=None, float? scale=None, bool causal=False, bool cosine=False, str head_reduction=\"mean\", str query_reduction=\"mean\") -> (Tensor scores, Tensor entropy, Tensor lse)");
  m.def("density_peaks(Tensor features, SymInt k, *, SymInt neighbors=5, Tensor? mask=None) -> (Tensor indices, Tensor counts, Tensor density, Tensor distance)");
  m.def("dpp_sample(Tensor features, SymInt k, *, Tensor? quality=None, Tensor? mask=None, float epsilon=1e-06) -> (Tensor indices, Tensor gains, Tensor counts)");
  m.def("gather_compact(Tensor[] tensors, Tensor indices, *, int[] dims, int[]? batch_dims=None) -> Tensor[]");
  m.def("_invert_indices(Tensor indices, SymInt size) -> Tensor");
  m.def("mask_to_indices(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor counts)");
  m.def("merge_tokens(Tensor values, Tensor targets, *, Tensor? keys=None, Tensor? assignment=None, Tensor? weights=None, Tensor? mask=None, float? threshold=None, str metric=\"cosine\", bool include_targets=True) -> (Tensor merged, Tensor sizes, Tensor assignment)");
  m.def("paired_cosine(Tensor a, Tensor b) -> Tensor");
  m.def("repulsion_sample(Tensor features, SymInt k, *, Tensor? positions=None, Tensor? seed_indices=None, Tensor? energy=None, Tensor? mask=None, str potential=\"cosine\", str aggregate=\"max\", float feature_weight=1.0, float position_weight=1.0, float exponent=1.0, float sigma=1.0, float epsilon=1e-06, str first=\"outlier\") -> (Tensor indices, Tensor counts)");
  m.def("score_entropy(Tensor scores, *, Tensor? mask=None, bool normalized=True) -> Tensor");
  m.def("select_grouped_topk(Tensor scores, Tensor groups, Tensor budgets, SymInt k, *, Tensor? mask=None, bool largest=True) -> (Tensor indices, Tensor counts)");
  m.def("select_mixture(Tensor text_scores, Tensor visual_scores, SymInt k, *, float floor=0.25, Tensor? mask=None) -> (Tensor indices, Tensor counts, Tensor num_text)");
  m.def("select_topk(Tensor scores, SymInt k, *, Tensor? mask=None, bool largest=True, Tensor? budgets=None) -> (Tensor indices, Tensor counts)");
  m.def("select_two_tailed(Tensor scores, Tensor num_low, SymInt k, *, Tensor? mask=None) -> (Tensor indices, Tensor counts)");
  m.def("spatial_semantic_nms(Tensor scores, Tensor features, Tensor positions, SymInt k, *, Tensor? groups=None, Tensor? mask=None, float radius=5.0, float sigma_spatial=1.5, float sigma_semantic=0.05, str mode=\"soft\", float threshold=0.5) -> (Tensor indices, Tensor selected_scores, Tensor counts)");
}

inline void check_attention_entropy(const Tensor& query, const Tensor& key, const OptionalTensor& key_mask, const OptionalTensor& query_positions, std::optional<double>, bool, bool) {
  const char* op = "attention_entropy";
  check_floating(op, "query", query, "[B, Hq, M, D]", 4);
  [[maybe_unused]] const int64_t B = query.size(0);
  [[maybe_unused]] const int64_t Hq = query.size(1);
  [[maybe_unused]] const int64_t M = query.size(2);
  [[maybe_unused]] const int64_t D = query.size(3);
  check_beside(op, "key", key, query, "[B, Hkv, N, D]", {B, -1, -1, D}, std::nullopt, "query");
  [[maybe_unused]] const int64_t Hkv = key.size(1);
  [[maybe_unused]] const int64_t N = key.size(2);
  check_beside(op, "key_mask", key_mask, query, "[B, N]", {B, N}, ScalarType::Bool);
  check_beside(op, "query_positions", query_positions, query, "[B, M]", {B, M}, ScalarType::Long);
  check_heads(op, query, key);
  check_work(op, "key", "B * Hq * M * N * D", {B, Hq, M, N, D});
}

// Which of the words each option is.
struct AttentionScoresChoices {
  int head_reduction;
  std::vector<int> query_reduction;
};

inline AttentionScoresChoices check_attention_scores(const Tensor& query, const Tensor& key, const Tensor& lse, const OptionalTensor& key_indices, const OptionalTensor& query_mask, const OptionalTensor& key_mask, const OptionalTensor& query_positions, std::optional<double>, bool, bool, const std::string& head_reduction, const std::string& query_reduction) {
  const char* op = "attention_scores";
  check_floating(op, "query", query, "[B, Hq, M, D]", 4);
  [[maybe_unused]] const int64_t B = query.size(0);
  [[maybe_unused]] const int64_t Hq = query.size(1);
  [[maybe_unused]] const int64_t M = query.size(2);
  [[maybe_unused]] const int64_t D = query.size(3);
  check_beside(op, "key", key, query, "[B, Hkv, N, D]", {B, -1, -1, D}, std::nullopt, "query");
  [[maybe_unused]] const int64_t Hkv = key.size(1);
  [[maybe_unused]] const int64_t N = key.size(2);
  check_beside(op, "lse", lse, query, "[B, Hq, M]", {B, Hq, M}, std::nullopt);
  check_beside(op, "key_indices", key_indices, query, "[B, V]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] int64_t V = key_indices ? key_indices->size(1) : -1;
  check_beside(op, "query_mask", query_mask, query, "[B, M]", {B, M}, ScalarType::Bool);
  check_beside(op, "key_mask", key_mask, query, "[B, N]", {B, N}, ScalarType::Bool);
  check_beside(op, "query_positions", query_positions, query, "[B, M]", {B, M}, ScalarType::Long);
  check_heads(op, query, key);
  check_work(op, "key", "B * Hq * M * max(N, V) * D", {B, Hq, M, std::max(N, V), D});
  return {check_choice(op, "head_reduction", head_reduction, {"mean", "sum", "max", "none"}), check_choices(op, "query_reduction", query_reduction, {"mean", "sum", "max", "last"}, "none")};
}

inline void check_contrastive_scores(const Tensor& features, const Tensor& anchor_indices, const Tensor& reference_indices) {
  const char* op = "contrastive_scores";
  check_floating(op, "features", features, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = features.size(0);
  [[maybe_unused]] const int64_t N = features.size(1);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_beside(op, "anchor_indices", anchor_indices, features, "[B, A]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] const int64_t A = anchor_indices.size(1);
  check_beside(op, "reference_indices", reference_indices, features, "[B, R]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] const int64_t R = reference_indices.size(1);
  check_work(op, "features", "B * N * max(A, R) * C", {B, N, std::max(A, R), C});
}

// Which of the words each option is.
struct CosineScoresChoices {
  int reduction;
};

inline CosineScoresChoices check_cosine_scores(const Tensor& features, const Tensor& queries, const OptionalTensor& query_mask, const std::string& reduction) {
  const char* op = "cosine_scores";
  check_floating(op, "features", features, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = features.size(0);
  [[maybe_unused]] const int64_t N = features.size(1);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_beside(op, "queries", queries, features, "[B, M, C]", {B, -1, C}, std::nullopt, "features");
  [[maybe_unused]] const int64_t M = queries.size(1);
  check_beside(op, "query_mask", query_mask, features, "[B, M]", {B, M}, ScalarType::Bool);
  check_work(op, "queries", "B * N * M * C", {B, N, M, C});
  return {check_choice(op, "reduction", reduction, {"max", "mean"})};
}

inline void check_coverage_sample(const Tensor& similarity, int64_t k, const OptionalTensor& row_weights, const OptionalTensor& quality, const OptionalTensor& row_mask, const OptionalTensor& mask) {
  const char* op = "coverage_sample";
  check_floating(op, "similarity", similarity, "[B, R, N]", 3);
  [[maybe_unused]] const int64_t B = similarity.size(0);
  [[maybe_unused]] const int64_t R = similarity.size(1);
  [[maybe_unused]] const int64_t N = similarity.size(2);
  check_count(op, "k", k, B);
  check_beside(op, "row_weights", row_weights, similarity, "[B, R]", {B, R}, std::nullopt);
  check_beside(op, "quality", quality, similarity, "[B, N]", {B, N}, std::nullopt);
  check_beside(op, "row_mask", row_mask, similarity, "[B, R]", {B, R}, ScalarType::Bool);
  check_beside(op, "mask", mask, similarity, "[B, N]", {B, N}, ScalarType::Bool);
  check_work(op, "similarity", "B * min(k, N) * R * N", {B, std::min(k, N), R, N});
}

// Which of the words each option is.
struct CrossAttentionScoresChoices {
  int head_reduction;
  std::vector<int> query_reduction;
};

inline CrossAttentionScoresChoices check_cross_attention_scores(const Tensor& query, const Tensor& key, const OptionalTensor& key_indices, const OptionalTensor& query_mask, const OptionalTensor& key_mask, const OptionalTensor& query_positions, std::optional<double>, bool, bool, const std::string& head_reduction, const std::string& query_reduction) {
  const char* op = "cross_attention_scores";
  check_floating(op, "query", query, "[B, Hq, M, D]", 4);
  [[maybe_unused]] const int64_t B = query.size(0);
  [[maybe_unused]] const int64_t Hq = query.size(1);
  [[maybe_unused]] const int64_t M = query.size(2);
  [[maybe_unused]] const int64_t D = query.size(3);
  check_beside(op, "key", key, query, "[B, Hkv, N, D]", {B, -1, -1, D}, std::nullopt, "query");
  [[maybe_unused]] const int64_t Hkv = key.size(1);
  [[maybe_unused]] const int64_t N = key.size(2);
  check_beside(op, "key_indices", key_indices, query, "[B, V]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] int64_t V = key_indices ? key_indices->size(1) : -1;
  check_beside(op, "query_mask", query_mask, query, "[B, M]", {B, M}, ScalarType::Bool);
  check_beside(op, "key_mask", key_mask, query, "[B, N]", {B, N}, ScalarType::Bool);
  check_beside(op, "query_positions", query_positions, query, "[B, M]", {B, M}, ScalarType::Long);
  check_heads(op, query, key);
  check_work(op, "key", "B * Hq * M * max(N, V) * D", {B, Hq, M, std::max(N, V), D});
  return {check_choice(op, "head_reduction", head_reduction, {"mean", "sum", "max", "none"}), check_choices(op, "query_reduction", query_reduction, {"mean", "sum", "max", "last"}, "none")};
}

inline void check_density_peaks(const Tensor& features, int64_t k, int64_t neighbors, const OptionalTensor& mask) {
  const char* op = "density_peaks";
  check_floating(op, "features", features, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = features.size(0);
  [[maybe_unused]] const int64_t N = features.size(1);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_count(op, "k", k, B);
  check_at_least(op, "neighbors", neighbors, 1);
  check_beside(op, "mask", mask, features, "[B, N]", {B, N}, ScalarType::Bool);
  check_work(op, "features", "B * N * N * C", {B, N, N, C});
}

inline void check_dpp_sample(const Tensor& features, int64_t k, const OptionalTensor& quality, const OptionalTensor& mask, double epsilon) {
  const char* op = "dpp_sample";
  check_floating(op, "features", features, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = features.size(0);
  [[maybe_unused]] const int64_t N = features.size(1);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_count(op, "k", k, B);
  check_beside(op, "quality", quality, features, "[B, N]", {B, N}, std::nullopt);
  check_beside(op, "mask", mask, features, "[B, N]", {B, N}, ScalarType::Bool);
  check_real(op, "epsilon", epsilon, 0, false, std::numeric_limits<double>::infinity());
  check_work(op, "features", "B * N * N * C", {B, N, N, C});
}

inline void check_invert_indices(const Tensor& indices, int64_t size) {
  const char* op = "_invert_indices";
  check_beside(op, "indices", indices, indices, "[B, K]", {-1, -1}, ScalarType::Long);
  [[maybe_unused]] const int64_t B = indices.size(0);
  [[maybe_unused]] const int64_t K = indices.size(1);
  check_count(op, "size", size, B);
}

inline void check_mask_to_indices(const Tensor& mask, int64_t capacity) {
  const char* op = "mask_to_indices";
  check_beside(op, "mask", mask, mask, "[B, N]", {-1, -1}, ScalarType::Bool);
  [[maybe_unused]] const int64_t B = mask.size(0);
  [[maybe_unused]] const int64_t N = mask.size(1);
  check_count(op, "capacity", capacity, B);
}

// Which of the words each option is.
struct MergeTokensChoices {
  int metric;
};

inline MergeTokensChoices check_merge_tokens(const Tensor& values, const Tensor& targets, const OptionalTensor& keys, const OptionalTensor& assignment, const OptionalTensor& weights, const OptionalTensor& mask, std::optional<double>, const std::string& metric, bool) {
  const char* op = "merge_tokens";
  check_floating(op, "values", values, "[B, N, D]", 3);
  [[maybe_unused]] const int64_t B = values.size(0);
  [[maybe_unused]] const int64_t N = values.size(1);
  [[maybe_unused]] const int64_t D = values.size(2);
  check_beside(op, "targets", targets, values, "[B, K]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] const int64_t K = targets.size(1);
  check_beside(op, "keys", keys, values, "[B, N, E]", {B, N, -1}, std::nullopt);
  [[maybe_unused]] int64_t E = keys ? keys->size(2) : -1;
  check_beside(op, "assignment", assignment, values, "[B, N]", {B, N}, ScalarType::Long);
  check_beside(op, "weights", weights, values, "[B, N]", {B, N}, std::nullopt);
  check_beside(op, "mask", mask, values, "[B, N]", {B, N}, ScalarType::Bool);
  check_work(op, "values", "B * N * K * max(D, E)", {B, N, K, std::max(D, E)});
  return {check_choice(op, "metric", metric, {"cosine", "euclidean"})};
}

inline void check_paired_cosine(const Tensor& a, const Tensor& b) {
  const char* op = "paired_cosine";
  check_floating(op, "a", a, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = a.size(0);
  [[maybe_unused]] const int64_t N = a.size(1);
  [[maybe_unused]] const int64_t C = a.size(2);
  check_beside(op, "b", b, a, "[B, N, C]", {B, N, C}, std::nullopt, "a");
}

// Which of the words each option is.
struct RepulsionSampleChoices {
  int potential;
  int aggregate;
  int first;
};

inline RepulsionSampleChoices check_repulsion_sample(const Tensor& features, int64_t k, const OptionalTensor& positions, const OptionalTensor& seed_indices, const OptionalTensor& energy, const OptionalTensor& mask, const std::string& potential, const std::string& aggregate, double feature_weight, double position_weight, double exponent, double sigma, double epsilon, const std::string& first) {
  const char* op = "repulsion_sample";
  check_floating(op, "features", features, "[B, N, C]", 3);
  [[maybe_unused]] const int64_t B = features.size(0);
  [[maybe_unused]] const int64_t N = features.size(1);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_count(op, "k", k, B);
  check_beside(op, "positions", positions, features, "[B, N, P]", {B, N, -1}, std::nullopt);
  [[maybe_unused]] int64_t P = positions ? positions->size(2) : -1;
  check_beside(op, "seed_indices", seed_indices, features, "[B, S]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] int64_t S = seed_indices ? seed_indices->size(1) : -1;
  check_beside(op, "energy", energy, features, "[B, N]", {B, N}, std::nullopt);
  check_beside(op, "mask", mask, features, "[B, N]", {B, N}, ScalarType::Bool);
  check_real(op, "feature_weight", feature_weight, 0, false, std::numeric_limits<double>::infinity());
  check_real(op, "position_weight", position_weight, 0, false, std::numeric_limits<double>::infinity());
  check_real(op, "exponent", exponent, 0, true, std::numeric_limits<double>::infinity());
  check_real(op, "sigma", sigma, 0, true, std::numeric_limits<double>::infinity());
  check_real(op, "epsilon", epsilon, 0, false, std::numeric_limits<double>::infinity());
  check_work(op, "features", "B * N * max(N, S) * max(C, P)", {B, N, std::max(N, S), std::max(C, P)});
  return {check_choice(op, "potential", potential, {"cosine", "riesz", "gaussian"}), check_choice(op, "aggregate", aggregate, {"max", "sum"}), check_choice(op, "first", first, {"outlier", "isolated", "index"})};
}

inline void check_score_entropy(const Tensor& scores, const OptionalTensor& mask, bool) {
  const char* op = "score_entropy";
  check_floating(op, "scores", scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = scores.size(0);
  [[maybe_unused]] const int64_t N = scores.size(1);
  check_beside(op, "mask", mask, scores, "[B, N]", {B, N}, ScalarType::Bool);
}

inline void check_select_grouped_topk(const Tensor& scores, const Tensor& groups, const Tensor& budgets, int64_t k, const OptionalTensor& mask, bool) {
  const char* op = "select_grouped_topk";
  check_floating(op, "scores", scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = scores.size(0);
  [[maybe_unused]] const int64_t N = scores.size(1);
  check_beside(op, "groups", groups, scores, "[B, N]", {B, N}, ScalarType::Long);
  check_beside(op, "budgets", budgets, scores, "[B, G]", {B, -1}, ScalarType::Long);
  [[maybe_unused]] const int64_t G = budgets.size(1);
  check_count(op, "k", k, B);
  check_beside(op, "mask", mask, scores, "[B, N]", {B, N}, ScalarType::Bool);
}

inline void check_select_mixture(const Tensor& text_scores, const Tensor& visual_scores, int64_t k, double floor, const OptionalTensor& mask) {
  const char* op = "select_mixture";
  check_floating(op, "text_scores", text_scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = text_scores.size(0);
  [[maybe_unused]] const int64_t N = text_scores.size(1);
  check_beside(op, "visual_scores", visual_scores, text_scores, "[B, N]", {B, N}, std::nullopt);
  check_count(op, "k", k, B);
  check_real(op, "floor", floor, 0, false, 0.5);
  check_beside(op, "mask", mask, text_scores, "[B, N]", {B, N}, ScalarType::Bool);
}

inline void check_select_topk(const Tensor& scores, int64_t k, const OptionalTensor& mask, bool, const OptionalTensor& budgets) {
  const char* op = "select_topk";
  check_floating(op, "scores", scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = scores.size(0);
  [[maybe_unused]] const int64_t N = scores.size(1);
  check_count(op, "k", k, B);
  check_beside(op, "mask", mask, scores, "[B, N]", {B, N}, ScalarType::Bool);
  check_beside(op, "budgets", budgets, scores, "[B]", {B}, ScalarType::Long);
}

inline void check_select_two_tailed(const Tensor& scores, const Tensor& num_low, int64_t k, const OptionalTensor& mask) {
  const char* op = "select_two_tailed";
  check_floating(op, "scores", scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = scores.size(0);
  [[maybe_unused]] const int64_t N = scores.size(1);
  check_beside(op, "num_low", num_low, scores, "[B]", {B}, ScalarType::Long);
  check_count(op, "k", k, B);
  check_beside(op, "mask", mask, scores, "[B, N]", {B, N}, ScalarType::Bool);
}

// Which of the words each option is.
struct SpatialSemanticNmsChoices {
  int mode;
};

inline SpatialSemanticNmsChoices check_spatial_semantic_nms(const Tensor& scores, const Tensor& features, const Tensor& positions, int64_t k, const OptionalTensor& groups, const OptionalTensor& mask, double radius, double sigma_spatial, double sigma_semantic, const std::string& mode, double threshold) {
  const char* op = "spatial_semantic_nms";
  check_floating(op, "scores", scores, "[B, N]", 2);
  [[maybe_unused]] const int64_t B = scores.size(0);
  [[maybe_unused]] const int64_t N = scores.size(1);
  check_beside(op, "features", features, scores, "[B, N, C]", {B, N, -1}, std::nullopt);
  [[maybe_unused]] const int64_t C = features.size(2);
  check_beside(op, "positions", positions, scores, "[B, N, 2]", {B, N, 2}, std::nullopt);
  check_count(op, "k", k, B);
  check_beside(op, "groups", groups, scores, "[B, N]", {B, N}, ScalarType::Long);
  check_beside(op, "mask", mask, scores, "[B, N]", {B, N}, ScalarType::Bool);
  check_real(op, "radius", radius, 0, false, std::numeric_limits<double>::infinity());
  check_real(op, "sigma_spatial", sigma_spatial, 0, true, std::numeric_limits<double>::infinity());
  check_real(op, "sigma_semantic", sigma_semantic, 0, true, std::numeric_limits<double>::infinity());
  check_real(op, "threshold", threshold, -std::numeric_limits<double>::infinity(), false, std::numeric_limits<double>::infinity());
  check_work(op, "features", "B * min(k, N) * N * C", {B, std::min(k, N), N, C});
  return {check_choice(op, "mode", mode, {"soft", "hard"})};
}

}  // namespace tokenprune
