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

    @classmethod
    def take(cls, inputs: Inputs, tokens: Tokens) -> "DeepStack | None":
        given = inputs.get("deepstack_visual_embeds")
        if given is None:
            return None
        # The rows are all visual tokens of the batch, one sample after the other.
        counts = torch.tensor(tokens.counts, device=tokens.slot.device)
        place = torch.where(tokens.origin >= 0, tokens.origin + (counts.cumsum(0) - counts).unsqueeze(1), -1)
        batch = len(tokens.counts)
        features = [t.unsqueeze(0).expand(batch, -1, -1) for t in given]
        return cls(gather_compact(features, place, dims=[1] * len(features)))

    def added(self, layer: int, hidden: Tensor, tokens: Tokens) -> Tensor:
        """The hidden states behind a layer, with its features added where visual tokens are left."""
        if not 0 <= layer < len(self.features):
            return hidden
        place = (
            gather_compact([tokens.origin + 1], tokens.slot, dims=[1])[0] - 1
        )  # 0 - 1 where there is no visual token
        (added,) = gather_compact([self.features[layer]], place, dims=[1])
        return hidden + added.to(hidden)
