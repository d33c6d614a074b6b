"""Vision towers: their attention in the layer whose features the model takes, and how salient it makes each patch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....ops import cross_attention_scores
from ..families import Inputs, Model


def _body(tower: Model) -> Any:
    return getattr(tower, "vision_model", tower)  # until transformers 5.11 or so, one module further down


def attention_of(core: Model) -> nn.Module:
    """The attention of the layer whose features the model takes."""
    return attention_in(core.vision_tower, getattr(core.config, "vision_feature_layer", -1))


def attention_in(tower: Model, chosen: int | Sequence[int]) -> nn.Module:
    """The attention of the layer that gives hidden_states[chosen] of a tower; of several, of the deepest."""
    body = _body(tower)
    stack = getattr(body, "encoder", None) or getattr(body, "transformer", None) or body
    layers: Any = getattr(stack, "layers", None) or getattr(stack, "layer", None)
    if layers is not None:
        depth = len(layers)
        last = max([chosen] if isinstance(chosen, int) else chosen, key=lambda index: index % (depth + 1))
        # hidden_states[i] is what layer i - 1 gives; the attention of that layer is meant, as hidden_states[-2] is
        # named together with attentions[-2].
        layer = layers[last if last < 0 else last - 1]
        for name in ("self_attn", "attention"):
            attention: nn.Module | None = getattr(layer, name, None)
            # One that makes its queries and keys itself is what calls the registered attention function.
            if attention is not None and hasattr(attention, "q_proj") and hasattr(attention, "k_proj"):
                return attention
    raise NotImplementedError(
        f"the attention of the vision tower, and {type(tower).__name__} has no layers with self_attn or attention that "
        "has q_proj and k_proj"
    )


def has_class_token(core: Model) -> bool:
    """Of the tower of images, where there is one for videos too: they are of one kind."""
    tower = core.vision_tower if hasattr(core, "vision_tower") else core.image_tower
    embeddings = getattr(_body(tower), "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def _strategy(core: Model) -> str:
    """Without one in the config, as in VipLLaVA and PaliGemma, all patches and nothing else are visual tokens."""
    return str(getattr(core.config, "vision_feature_select_strategy", "default" if has_class_token(core) else "full"))


def cut_in_front(core: Model) -> int:
    """How many of the tower's tokens of an image the model leaves out, in front."""
    return int(_strategy(core) == "default")


def check_grid(core: Model) -> None:
    """The visual tokens of an image must be its patches, no more and no less."""
    if has_class_token(core) != bool(cut_in_front(core)):
        whether = "with" if has_class_token(core) else "without"
        raise NotImplementedError(
            f"prune_visual_tokens: vision_feature_select_strategy {_strategy(core)!r} and a vision tower {whether} a "
            "class token: the visual tokens are no grid of patches"
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
    return torch.cat([mean_attention(q, k, scale).flatten() for q, k in chunks])


def mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[images, keys]: the attention that each receives, the mean over heads and queries."""
    with torch.no_grad():
        return cross_attention_scores(query, key, scale=scale)[0]


def tower_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs | None = None) -> Tensor:
    """[images or crops, tokens of the tower]: the class token's attention, averaged over heads (AdaFV); in a tower
    without one, the attention that a patch receives, averaged over heads and queries."""
    return mean_attention(query[:, :, :1] if has_class_token(core) else query, key, scale)


def patch_scores(core: Model, query: Tensor, key: Tensor, scale: float, keywords: Inputs | None = None) -> Tensor:
    """`tower_scores` of the tokens that the model takes."""
    return tower_scores(core, query, key, scale)[:, cut_in_front(core) :]


def window_means(scores: Tensor, side: int, window: int) -> Tensor:
    """[images, tokens] float32 from [images, side * side] patches: the mean over the window of each token."""
    squares = scores.float().unflatten(1, (1, side, side))
    return torch.nn.functional.avg_pool2d(squares, window).flatten(1)
