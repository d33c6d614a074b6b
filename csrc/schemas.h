// The op schemas, once for every library that defines them: this package's and the emulator's.
#pragma once

#include <torch/csrc/stable/library.h>

#define TOKENPRUNE_MASKING \
  "Tensor? key_mask=None, Tensor? query_positions=None, float? scale=None, bool causal=False, bool cosine=False"
#define TOKENPRUNE_REDUCING                                                \
  "Tensor? key_indices=None, Tensor? query_mask=None, " TOKENPRUNE_MASKING \
  ", str head_reduction=\"mean\", str query_reduction=\"mean\""

namespace tokenprune {

// Defines every op in a library: torch.ops.tokenprune, or the emulator's namespace.
inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def("cross_attention_scores(Tensor query, Tensor key, *, " TOKENPRUNE_REDUCING
        ") -> (Tensor scores, Tensor entropy, Tensor lse)");
  m.def("attention_entropy(Tensor query, Tensor key, *, " TOKENPRUNE_MASKING ") -> (Tensor entropy, Tensor lse)");
  m.def("attention_scores(Tensor query, Tensor key, Tensor lse, *, " TOKENPRUNE_REDUCING ") -> Tensor");
  m.def("score_entropy(Tensor scores, *, Tensor? mask=None, bool normalized=True) -> Tensor");
  m.def("cosine_scores(Tensor features, Tensor queries, *, Tensor? query_mask=None, str reduction=\"max\") -> Tensor");
  m.def("contrastive_scores(Tensor features, Tensor anchor_indices, Tensor reference_indices) -> Tensor");
  m.def(
      "select_topk(Tensor scores, SymInt k, *, Tensor? mask=None, bool largest=True)"
      " -> (Tensor indices, Tensor counts)");
  m.def(
      "select_two_tailed(Tensor scores, Tensor num_low, SymInt k, *, Tensor? mask=None)"
      " -> (Tensor indices, Tensor counts)");
  m.def(
      "select_mixture(Tensor text_scores, Tensor visual_scores, SymInt k, *, float floor=0.25, Tensor? mask=None)"
      " -> (Tensor indices, Tensor counts, Tensor num_text)");
  m.def("mask_to_indices(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor counts)");
  m.def(
      "repulsion_sample(Tensor features, SymInt k, *, Tensor? positions=None, Tensor? seed_indices=None,"
      " Tensor? energy=None, Tensor? mask=None, str potential=\"cosine\", str aggregate=\"max\","
      " float feature_weight=1.0, float position_weight=1.0, float exponent=1.0, float sigma=1.0,"
      " float epsilon=1e-06, str first=\"outlier\") -> (Tensor indices, Tensor counts)");
  m.def(
      "spatial_semantic_nms(Tensor scores, Tensor features, Tensor positions, SymInt k, *, Tensor? groups=None,"
      " Tensor? mask=None, float radius=5.0, float sigma_spatial=1.5, float sigma_semantic=0.05,"
      " str mode=\"soft\", float threshold=0.5) -> (Tensor indices, Tensor selected_scores, Tensor counts)");
  m.def("gather_compact(Tensor[] tensors, Tensor indices, *, int[] dims, int[]? batch_dims=None) -> Tensor[]");
  m.def("_invert_indices(Tensor indices, SymInt size) -> Tensor");  // for the gradient of gather_compact
}

}  // namespace tokenprune

#undef TOKENPRUNE_REDUCING
#undef TOKENPRUNE_MASKING
