"""DeepStack (Qwen3-VL): features of inner vision layers that are added to the visual tokens after the first layers.

The model's loop would add them to the columns the visual tokens had before pruning. So they are taken out of its
arguments, and added in front of the next layer: what a layer itself gives is what transformers records of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import gather_compact
from .families import Inputs
from .tokens import Tokens


@dataclass
class DeepStack:
    features: list[Tensor]  # [B, V, C] for each of the first layers, of the unpruned visual tokens

    def added(self, layer: int, hidden: Tensor, tokens: Tokens) -> Tensor:
        """The hidden states behind a layer, with its features added where visual tokens are left."""
        if not 0 <= layer < len(self.features):
            return hidden
        (added,) = gather_compact([self.features[layer]], tokens.prompt_slot(), dims=[1])
        return hidden + added.to(hidden)


def take_deepstack(inputs: Inputs, tokens: Tokens) -> tuple[DeepStack | None, Inputs]:
    """The features in the arguments of the decoder, and these arguments without them."""
    given = inputs.get("deepstack_visual_embeds")
    if given is None:
        return None, inputs
    # The rows are all visual tokens of the batch, one sample after the other.
    counts = (tokens.origin >= 0).sum(1)
    row = torch.where(tokens.origin >= 0, tokens.origin + (counts.cumsum(0) - counts).unsqueeze(1), -1)
    features = [t.unsqueeze(0).expand(len(tokens.counts), -1, -1) for t in given]
    taken = DeepStack(gather_compact(features, row, dims=[1] * len(features)))
    return taken, {**inputs, "deepstack_visual_embeds": None, "visual_pos_masks": None}
