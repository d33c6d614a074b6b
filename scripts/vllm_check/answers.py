"""An answer and its log-probabilities: the engine's, and those of transformers inside `prune_visual_tokens`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.vllm import Setting
from tokenprune_kernels.methods import sts_structure

from .prompts import Prompt

TOKENS = 4  # of an answer
# What a random model may answer: words, and no token that stands for an image.
WORDS = [token for token in range(69) if token != 4]


@dataclass(frozen=True)
class Answer:
    """length: tokens of the prompt. tokens: of the answer. logprobs: for each of them, some of the vocabulary's."""

    length: int
    tokens: list[int]
    logprobs: list[dict[int, float]]


def of_engine(output: Any) -> Answer:
    """Of a RequestOutput of the offline engine."""
    (answer,) = output.outputs
    logprobs = [{token: each.logprob for token, each in step.items()} for step in answer.logprobs]
    return Answer(len(output.prompt_token_ids), list(answer.token_ids), logprobs)


class Transformers:
    """The same checkpoint in transformers."""

    def __init__(self, family: str, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.family = family
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.positions = None if family.startswith("Qwen") else "renumber"

    def inputs(self, prompt: Prompt) -> Any:
        text, images = prompt.text(self.family), list(prompt.images) or None
        return self.processor(text=text, images=images, return_tensors="pt")

    @torch.no_grad()
    def logits(self, prompt: Prompt, setting: Setting, tokens: list[int]) -> tuple[int, Tensor]:
        """(tokens of the pruned prompt, [len(tokens), vocabulary] in front of each of `tokens`)."""
        method: Any = _sts_structure if setting.method == "sts_structure" else setting.method
        inputs = self.inputs(prompt)
        # The answer's tokens stand behind the image, as more of the question would: methods here do not read it.
        more = len(tokens) - 1
        given = {name: t for name, t in inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, more))
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.int64)], 1)
        with prune_visual_tokens(
            self.model,
            method,
            setting.keep,
            per="image",
            positions=self.positions,
            seed=setting.seed,
            **setting.options,
        ):
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
        return out.logits.shape[1] - more, out.logits[0, -len(tokens) :]


def _sts_structure(features: Tensor, k: int, stacked_positions: Tensor, mask: Tensor | None = None) -> Any:
    """The first stage of sts, which is no method of its own."""
    return sts_structure(features, k, positions=stacked_positions, mask=mask)


def difference(engine: Answer, logits: Tensor) -> float:
    """The largest of the log-probabilities that the engine told."""
    expected = torch.log_softmax(logits.double(), -1)
    return max(
        abs(float(row[token]) - value)
        for row, told in zip(expected, engine.logprobs, strict=True)
        for token, value in told.items()
    )
