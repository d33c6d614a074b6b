"""AdaFV (arXiv 2501.09532): share the budget between the text's and the vision encoder's ranking."""

from torch import Tensor

from .._op import Budget
from ..ops import cross_attention_scores, select_mixture
from ._calls import called_like_ops
from ._common import Selection, check_count, check_visual
from ._method import Method, Stage


@called_like_ops
def adafv(
    text_embeddings: Tensor,
    visual_embeddings: Tensor,
    saliency: Tensor,
    k: Budget,
    *,
    text_mask: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 100.0,
    floor: float = 0.25,
    backend: str | None = None,
) -> Selection:
    """AdaFV (arXiv 2501.09532), self-adaptive cross-modality attention mixture, before the language model.

    1. a_t(j) = max over text rows i of softmax_j(temperature * cos(t_i, v_j)), the softmax over all visual tokens.
    2. a_v(j) = `saliency`: what the CLS token of the vision encoder attends to, mean over heads.
    3. b = floor(floor * K) tokens of each ranking are always kept; R = K - 2 b slots are left. With prefix sums P_t
       and P_v of the two rankings after their first b,  r* = argmax over r in 0..R of sqrt(P_t(r) * P_v(R - r)), the
       geometric mean of the masses; the first maximum wins.
    4. Keep the first b + r* of the text ranking and the first b + R - r* of the visual one.

    text_embeddings [B, T, C] are rows of the language model's embedding table, for the tokens after the image;
    visual_embeddings [B, V, C] the projector's outputs, all crops concatenated; saliency [B, V], not negative.
    text_mask [B, T] and mask [B, V] mark what is not padding. The returned indices are positions among the V tokens.

    Where it comes from. The mechanism, temperature = 100 and floor = 0.25 stand in the code of the authors' successor
    AdaV (ACL Findings 2025); that AdaFV uses the same constants is our reading; floor = 0 is the pure geometric mean.
    Three things differ from that code, on purpose: rankings run over all crops (there, the CLS picks of a later crop
    are offset by its number instead of by its tokens, and are not sorted across crops), a token chosen twice is kept
    once, and the slots that this frees go to the best of the others by the larger normalised score: exactly
    min(K, V) distinct tokens come out. Without a CLS token, the mean attention received is our substitute.

    details: text and saliency [B, V], num_text [B] = b + r*.

    >>> import torch
    >>> from tokenprune_kernels.methods import adafv
    >>> visual = torch.eye(4).unsqueeze(0)
    >>> saliency = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    >>> kept = adafv(visual[:, :1], visual, saliency, 2, floor=0.5)  # the text names token 0, the encoder token 3
    >>> kept.indices, kept.details["num_text"]
    (tensor([[0, 3]]), tensor([1]))
    """
    k = check_count("adafv", k)
    check_visual("adafv", "saliency", saliency, *visual_embeddings.shape[:2])
    text, _, _ = cross_attention_scores(
        text_embeddings.unsqueeze(1), visual_embeddings.unsqueeze(1), query_mask=text_mask, key_mask=mask,
        scale=temperature, cosine=True, query_reduction="max", backend=backend,
    )  # fmt: skip
    indices, counts, num_text = select_mixture(text, saliency, k, floor=floor, mask=mask, backend=backend)
    return Selection(indices, counts, {"text": text, "saliency": saliency, "num_text": num_text})


ADAFV = Method(
    "adafv",
    (Stage(adafv, "model"),),
    title="AdaFV",
    summary="likeness to the question, mixed with the vision tower's saliency",
    paper="2501.09532",
    source="the code of its successor AdaV",
    positions="renumber",  # AdaV's code shortens the embeddings and lets the model number them anew
)
