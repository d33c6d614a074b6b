"""What each method is given at its place in the model, and the visual tokens it keeps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import gather_compact, methods
from .layout import Layout
from .tokens import Tokens

BEFORE_THE_MODEL = ("adafv", "zspaprune", "divprune", "random", "sts_structure")
ON_ATTENTION = ("coast", "sts_semantics", "adaptprune", "fastv")
ON_LAYOUT = ("adaptprune", "sts_structure")


@dataclass(frozen=True)
class Shown:
    """Query and key of the attention before the pruning layer, of all rows and keys."""

    query: Tensor
    key: Tensor
    scale: float
    lse: Tensor | None


@dataclass(frozen=True)
class Moment:
    """All that is known in front of the decoder layer where tokens are chosen."""

    tokens: Tokens
    hidden: Tensor  # [B, L, C]
    layer: Any  # the decoder layer, a module
    layout: Layout | None  # of the unpruned visual tokens, on the device; for the methods of ON_LAYOUT
    shown: Shown | None
    saliency: Tensor | None  # [B, V] of the unpruned visual tokens
    generator: torch.Generator | None
    options: dict[str, Any]

    def rows(self, which: list[int]) -> "Moment":
        """The same moment of some samples."""

        def part(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[which]

        t = self.tokens
        tokens = replace(
            t, slot=t.slot[which], visual=t.visual[which], counts=[t.counts[b] for b in which], real=part(t.real),
            lengths=[t.lengths[b] for b in which], origin=t.origin[which],
        )  # fmt: skip
        shown = self.shown
        if shown is not None:
            shown = replace(shown, query=shown.query[which], key=shown.key[which], lse=part(shown.lse))
        layout = self.layout
        if layout is not None:
            layout = Layout(*(t[which] for t in vars(layout).values()))
        return replace(
            self, tokens=tokens, hidden=self.hidden[which], shown=shown, layout=layout, saliency=part(self.saliency)
        )

    # --- what the methods take -------------------------------------------------------------------------------------

    def features(self) -> Tensor:
        """[B, V, C]: the hidden states of the visual tokens."""
        return gather_compact([self.hidden], self.tokens.visual, dims=[1])[0]

    def by_origin(self, values: Tensor) -> Tensor:
        """Something known of every unpruned visual token, of those that are left."""
        return gather_compact([values], self.tokens.origin, dims=[1])[0]

    def text_rows(self) -> tuple[int, Tensor]:
        """The first row of the text behind the pictures, and [B, M] which rows from there on are such text.

        The last real row always is: a prompt may end with a picture.
        """
        t = self.tokens
        first = t.length - t.suffix
        column = torch.arange(first, t.length, device=t.slot.device)
        last = t.visual.amax(1, keepdim=True) if t.visual.shape[1] else t.slot.new_full((len(t.counts), 1), -1)
        if t.real is None:
            return first, (column > last) | (column == t.length - 1)
        real = t.real[:, first:]
        return first, (column > last) & real | (column == torch.where(real, column, -1).amax(1, keepdim=True))

    def text(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the text behind the pictures [B, M, C], and which of them count [B, M]."""
        first, mask = self.text_rows()
        return self.hidden[:, first:], mask

    def attention(self) -> dict[str, Any]:
        """Query and key, and the keywords that say which rows and keys are meant."""
        assert self.shown is not None
        first, mask = self.text_rows()
        shown, batch = self.shown, len(self.tokens.counts)
        places = torch.arange(first, self.tokens.length, device=mask.device).expand(batch, -1)
        return {
            "query": shown.query[:, :, first:],
            "key": shown.key,
            "key_indices": self.tokens.visual,
            "query_positions": places,
            "query_mask": mask,
            "key_mask": self.tokens.real,
            "scale": shown.scale,
            "lse": None if shown.lse is None else shown.lse[:, :, first:],
        }


def _coast(m: Moment, k: int) -> Tensor:
    return methods.coast(features=m.features(), k=k, **m.attention(), **m.options).indices


def _fastv(m: Moment, k: int) -> Tensor:
    return methods.fastv(k=k, **m.attention(), **m.options).indices


def _sts_semantics(m: Moment, k: int) -> Tensor:
    return methods.sts_semantics(k=k, **m.attention(), backend=m.options.get("backend")).indices


def _adaptprune(m: Moment, k: int) -> Tensor:
    assert m.layout is not None
    # The authors compare keys before RoPE, projected from hidden states that the layer has not normalised.
    keys: Tensor = m.layer.self_attn.k_proj(m.features())
    return methods.adaptprune(
        features=keys, positions=m.by_origin(m.layout.positions), k=k, grid=m.by_origin(m.layout.grids),
        groups=m.by_origin(m.layout.groups), **m.attention(), **m.options,
    ).indices  # fmt: skip


def _sts_structure(m: Moment, k: int) -> Tensor:
    assert m.layout is not None
    # Crops and frames lie along a third axis, the largest grid's diagonal apart: equal places in two do not repel.
    grids, groups = m.by_origin(m.layout.grids), m.by_origin(m.layout.groups)
    depth = groups.unsqueeze(-1) * grids.norm(dim=-1, keepdim=True).amax(1, keepdim=True)
    places = torch.cat([m.by_origin(m.layout.positions), depth], -1)
    return methods.sts_structure(
        m.features(), k, positions=places, mask=m.tokens.visual_mask(), **m.options
    ).indices  # fmt: skip


def _adafv(m: Moment, k: int) -> Tensor:
    assert m.saliency is not None
    text, mask = m.text()
    return methods.adafv(
        text, m.features(), m.by_origin(m.saliency), k, text_mask=mask, mask=m.tokens.visual_mask(), **m.options
    ).indices


def _zspaprune(m: Moment, k: int) -> Tensor:
    text, mask = m.text()
    return methods.zspaprune(
        text, m.features(), k, text_mask=mask, mask=m.tokens.visual_mask(), **m.options
    ).indices  # fmt: skip


def _divprune(m: Moment, k: int) -> Tensor:
    return methods.divprune(m.features(), k, mask=m.tokens.visual_mask(), **m.options).indices


def _random(m: Moment, k: int) -> Tensor:
    return methods.random(m.tokens.visual.shape[1], k, m.generator, mask=m.tokens.visual >= 0, **m.options).indices


_METHODS: dict[str, Callable[[Moment, int], Tensor]] = {
    "coast": _coast, "fastv": _fastv, "sts_semantics": _sts_semantics, "adaptprune": _adaptprune,
    "sts_structure": _sts_structure, "adafv": _adafv, "zspaprune": _zspaprune, "divprune": _divprune,
    "random": _random,
}  # fmt: skip


def check_layer(method: str, layer: Any) -> None:
    """Whether a decoder layer has what a method asks of it."""
    if method == "adaptprune" and not hasattr(layer.self_attn, "k_proj"):
        raise NotImplementedError(
            f"prune_visual_tokens: adaptprune compares keys before RoPE, and {type(layer.self_attn).__name__} has no "
            "k_proj that makes them alone"
        )


def choose(method: str, moment: Moment, budgets: list[int]) -> Tensor:
    """[B, K]: places among the visual tokens, ascending, -1 after the last; K is the largest budget of a sample.

    Samples with the same budget are one batched call.
    """
    run = _METHODS[method]
    if len(set(budgets)) == 1:
        return run(moment, budgets[0])
    selected = moment.tokens.visual.new_full((len(budgets), max(budgets)), -1)
    for k in sorted(set(budgets) - {0}):
        which = [b for b, budget in enumerate(budgets) if budget == k]
        selected[which, :k] = run(moment.rows(which), k)
    return selected
