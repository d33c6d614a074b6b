"""Vision towers: their attention in the layer whose features the model takes, and how salient it makes each patch."""

from typing import Any

import torch
from torch import Tensor, nn

from ....ops import cross_attention_scores
from ..families import Inputs, Model


def _body(tower: Model) -> Any:
    return getattr(tower, "vision_model", tower)  # until transformers 5.11 or so, one module further down


def attention_of(core: Model) -> nn.Module:
    """The attention of the layer whose features the model takes; of several layers, of the last."""
    body = _body(core.vision_tower)
    stack = getattr(body, "encoder", None) or getattr(body, "transformer", None)
    layers: Any = getattr(stack, "layers", None) or getattr(stack, "layer", None)
    chosen = getattr(core.config, "vision_feature_layer", -1)
    last = chosen if isinstance(chosen, int) else chosen[-1]
    if layers is not None:
        # hidden_states[i] is what layer i - 1 gives; the attention of that layer is meant, as hidden_states[-2] is
        # named together with attentions[-2].
        layer = layers[last if last < 0 else last - 1]
        for name in ("self_attn", "attention"):
            attention: nn.Module | None = getattr(layer, name, None)
            # One that makes its queries and keys itself is what calls the registered attention function.
            if attention is not None and hasattr(attention, "q_proj") and hasattr(attention, "k_proj"):
                return attention
    raise NotImplementedError(
        f"the attention of the vision tower, and {type(core.vision_tower).__name__} has no layers with self_attn or "
        "attention that has q_proj and k_proj"
    )


def has_class_token(core: Model) -> bool:
    embeddings = getattr(_body(core.vision_tower), "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def cut_in_front(core: Model) -> int:
    """How many of the tower's tokens of an image the model leaves out, in front."""
    return int(getattr(core.config, "vision_feature_select_strategy", "full") == "default")


def check_grid(core: Model) -> None:
    """The visual tokens of an image must be its patches, no more and no less."""
    if has_class_token(core) != bool(cut_in_front(core)):
        whether = "with" if has_class_token(core) else "without"
        raise NotImplementedError(
            f"prune_visual_tokens: vision_feature_select_strategy {core.config.vision_feature_select_strategy!r} and a "
            f"vision tower {whether} a class token: the visual tokens are no grid of patches"
        )


def attended(core: Model, query: Tensor, key: Tensor, scale: float, _: Inputs) -> tuple[Tensor, Tensor, float]:
    """Which tokens of a sequence are one image's is known when the prompt comes."""
    return query.detach(), key.detach(), scale


def received_attention(query: Tensor, key: Tensor, scale: float, lengths: list[int]) -> Tensor:
    """[tokens]: what each token receives from those of its own image, the mean over heads and queries.

    query, key [1, H, tokens, D]: the images one after the other, `lengths` tokens each.
    """
    if len(set(lengths)) == 1:  # one call for all of them
        chunks = [tuple(t.squeeze(0).unflatten(1, (len(lengths), -1)).transpose(0, 1) for t in (query, key))]
    else:
        chunks = list(zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))
    with torch.no_grad():
        return torch.cat([cross_attention_scores(q, k, scale=scale)[0].flatten() for q, k in chunks])


def patch_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs | None = None) -> Tensor:
    """[images or crops, tokens that the model takes of each]: the class token's attention, averaged over heads (AdaFV);
    in a tower without one, the attention that a patch receives, averaged over heads and queries."""
    if has_class_token(core):
        query = query[:, :, :1]
    with torch.no_grad():
        scores, _, _ = cross_attention_scores(query, key, scale=scale)
    return scores[:, cut_in_front(core) :]
