"""What training asks of a block: layers that are recomputed, and labels and logits of columns that were dropped."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from ... import gather_compact
from .families import Inputs, Model

IGNORED = -100  # the label of a column that counts for nothing
# Versions that have this take indices of each sample [B, K], those before only indices [K] of all of them.
_OF_EACH_SAMPLE = hasattr(modeling_utils, "slice_logits_to_keep")


def check_checkpointing(decoder: Model) -> None:
    """A layer that is recomputed must be called as it was: its hooks must stay outside of what is recomputed."""
    if not any(getattr(m, "gradient_checkpointing", False) and m.training for m in (decoder, *decoder.layers)):
        return
    for layer in decoder.layers:
        if not isinstance(layer, GradientCheckpointingLayer) or type(layer).__call__ is not nn.Module.__call__:
            raise NotImplementedError(
                "prune_visual_tokens: gradient checkpointing must recompute the forward of a layer without its hooks, "
                f"as newer versions of transformers do, and {type(layer).__name__} recomputes both; disable it, call "
                "model.eval() or leave the block"
            )


def check_head(head: Model, inputs: Inputs) -> None:
    """Whether a call of the head with visual tokens can be given what is left of its labels and logits_to_keep."""
    wanted = inputs.get("logits_to_keep")
    if isinstance(wanted, Tensor) and (wanted.dtype == torch.bool or wanted.dim() > 1 + _OF_EACH_SAMPLE):
        raise NotImplementedError(
            f"prune_visual_tokens: logits_to_keep must be an int or indices [K]{' or [B, K]' * _OF_EACH_SAMPLE} into "
            f"the prompt, got {wanted.dtype} {list(wanted.shape)}"
        )
    if inputs.get("labels") is not None:
        names = inspect.unwrap(type(head).forward).__code__.co_names
        if "loss_function" not in names:
            raise NotImplementedError(
                f"prune_visual_tokens: labels need a loss that {type(head).__name__} computes by self.loss_function, "
                f"which its forward does not name; compute the loss outside, of logits indexed from the right end"
            )


@dataclass
class HeadCall:
    """A call of the model with its language-modelling head, of a prompt of `length` columns.

    wanted [B, K]: the columns whose logits are asked for; indices, of the shape that was given: what the head gets
    instead, and reads when the decoder is done. columns [B, L']: which column of the prompt each of those that are left
    was, -1 for padding; None: nothing was pruned.
    """

    wanted: Tensor | None = None
    indices: Tensor | None = None
    columns: Tensor | None = None
    length: int = 0

    def pruned(self, columns: Tensor, length: int) -> None:
        self.columns, self.length = columns, length
        if self.wanted is None or self.indices is None:
            return
        found = columns.unsqueeze(1) == self.wanted.to(columns.device).unsqueeze(2)  # [B, K, L']
        at = found.int().argmax(2)
        apart = self.indices.dim() == 1 and bool((at != at[:1]).any())
        if apart or not bool(found.any(2).all()):
            what = "are at different places of different samples" if apart else "were dropped in a sample"
            raise ValueError(
                f"prune_visual_tokens: logits_to_keep asks for the columns {self.wanted.tolist()} of the prompt, some "
                f"of which {what}; ask for text, or for the last columns by an int"
            )
        self.indices.copy_(at[0] if self.indices.dim() == 1 else at)

    def of_loss(self, given: Inputs) -> Inputs:
        """The arguments of a loss function, with labels of the columns that are left."""
        labels, logits = given.get("labels"), given.get("logits")
        if self.columns is None or not isinstance(labels, Tensor) or not isinstance(logits, Tensor):
            return given
        if labels.shape[1:] != (self.length,) or logits.shape[1] != self.columns.shape[1]:
            return given  # of columns that the caller chose
        # The loss moves labels one to the left. Each column then finds what it predicted in the prompt: the token
        # behind it there, and not the next one that is left.
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        aligned = torch.nn.functional.pad(self._left(following)[:, :-1], (1, 0), value=IGNORED)
        shifted = given.get("shift_labels")
        return {**given, "labels": aligned} | ({} if shifted is None else {"shift_labels": self._left(shifted)})

    def _left(self, labels: Tensor) -> Tensor:
        """[B, L'] of labels [B, L]."""
        assert self.columns is not None
        (kept,) = gather_compact([labels - IGNORED], self.columns.to(labels.device), dims=[1])
        return kept + IGNORED


def begin_head(inputs: Inputs) -> tuple[HeadCall, Inputs]:
    """The call, and the arguments that the head gets."""
    wanted, new = inputs.get("logits_to_keep"), inputs.get("input_ids")
    new = inputs.get("inputs_embeds") if new is None else new
    if new is None or not isinstance(wanted, Tensor) or wanted.dtype == torch.bool:
        return HeadCall(), inputs
    batch, length = new.shape[:2]
    columns = torch.where(wanted < 0, wanted + length, wanted).expand(batch, -1)
    indices = columns.clone() if _OF_EACH_SAMPLE else wanted.clone()
    return HeadCall(columns, indices), {**inputs, "logits_to_keep": indices}
