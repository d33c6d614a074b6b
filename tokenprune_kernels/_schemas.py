"""The thirteen op schemas; csrc/ops.cpp holds the same strings for processes without Python (a test compares)."""

_ATTENTION = (
    "Tensor? key_mask=None, Tensor? query_positions=None, float? scale=None, bool causal=False, bool cosine=False"
)
_REDUCED_ATTENTION = (
    f"Tensor? key_indices=None, Tensor? query_mask=None, {_ATTENTION}, "
    'str head_reduction="mean", str query_reduction="mean"'
)

SCHEMAS: dict[str, str] = {
    "cross_attention_scores": f"(Tensor query, Tensor key, *, {_REDUCED_ATTENTION})"
    " -> (Tensor scores, Tensor entropy, Tensor lse)",
    "attention_entropy": f"(Tensor query, Tensor key, *, {_ATTENTION}) -> (Tensor entropy, Tensor lse)",
    "attention_scores": f"(Tensor query, Tensor key, Tensor lse, *, {_REDUCED_ATTENTION}) -> Tensor",
    "score_entropy": "(Tensor scores, *, Tensor? mask=None, bool normalized=True) -> Tensor",
    "cosine_scores": '(Tensor features, Tensor queries, *, Tensor? query_mask=None, str reduction="max") -> Tensor',
    "contrastive_scores": "(Tensor features, Tensor anchor_indices, Tensor reference_indices) -> Tensor",
    "select_topk": "(Tensor scores, SymInt k, *, Tensor? mask=None, bool largest=True)"
    " -> (Tensor indices, Tensor counts)",
    "select_two_tailed": "(Tensor scores, Tensor num_low, SymInt k, *, Tensor? mask=None)"
    " -> (Tensor indices, Tensor counts)",
    "select_mixture": "(Tensor text_scores, Tensor visual_scores, SymInt k, *, float floor=0.25, Tensor? mask=None)"
    " -> (Tensor indices, Tensor counts, Tensor num_text)",
    "mask_to_indices": "(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor counts)",
    "repulsion_sample": "(Tensor features, SymInt k, *, Tensor? positions=None, Tensor? seed_indices=None,"
    ' Tensor? energy=None, Tensor? mask=None, str potential="cosine", str aggregate="max",'
    " float feature_weight=1.0, float position_weight=1.0, float exponent=1.0, float sigma=1.0,"
    ' float epsilon=1e-06, str first="outlier") -> (Tensor indices, Tensor counts)',
    "spatial_semantic_nms": "(Tensor scores, Tensor features, Tensor positions, SymInt k, *, Tensor? groups=None,"
    " Tensor? mask=None, float radius=5.0, float sigma_spatial=1.5, float sigma_semantic=0.05,"
    ' str mode="soft", float threshold=0.5) -> (Tensor indices, Tensor selected_scores, Tensor counts)',
    "gather_compact": "(Tensor[] tensors, Tensor indices, *, int[] dims, int[]? batch_dims=None) -> Tensor[]",
}

# Not for users: what the gradient of gather_compact is made of.
PRIVATE_SCHEMAS = {"_invert_indices": "(Tensor indices, SymInt size) -> Tensor"}
