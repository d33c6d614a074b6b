"""An answer and its log-probabilities: the engine's, and those of transformers inside `prune_visual_tokens`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.vllm import Setting

from .prompts import Prompt

TOKENS = 4  # of an answer


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

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.positions = None if "Qwen" in type(self.model).__name__ else "renumber"

    def block(self, setting: Setting) -> Any:
        stages = {"sts_structure": _sts_structure}
        method = stages.get(str(setting.method), setting.method)
        return prune_visual_tokens(
            self.model, method, setting.keep, positions=self.positions, seed=setting.seed, **setting.options
        )

    def inputs(self, prompt: Prompt) -> Any:
        return self.processor(text=prompt.text, images=list(prompt.images) or None, return_tensors="pt")

    @torch.no_grad()
    def logits(self, prompt: Prompt, setting: Setting, tokens: list[int]) -> tuple[int, Tensor]:
        """(tokens of the pruned prompt, [len(tokens), vocabulary] in front of each of `tokens`)."""
        if len(prompt.images) > 1:
            embeddings = self._joined(prompt, setting)
            answer = self.model.get_input_embeddings()(torch.tensor([tokens[:-1]]))
            out = self.model(inputs_embeds=torch.cat([embeddings, answer], 1))
            return embeddings.shape[1], out.logits[0, -len(tokens) :]
        inputs = self.inputs(prompt)
        ids = inputs.pop("input_ids")
        behind = torch.tensor([tokens[:-1]])
        # The answer's tokens stand behind the image, as more of the question would: methods here do not read it.
        given = {name: t for name, t in inputs.items() if name not in ("attention_mask", "mm_token_type_ids")}
        if "mm_token_type_ids" in inputs:
            given["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, behind.shape[1]))
        with self.block(setting):
            out = self.model(input_ids=torch.cat([ids, behind], 1), **given)
        return out.logits.shape[1] - behind.shape[1], out.logits[0, -len(tokens) :]

    def _joined(self, prompt: Prompt, setting: Setting) -> Tensor:
        """Embeddings of a prompt whose images are chosen from one by one, as the engine does, in [1, L, C]."""
        table = self.model.get_input_embeddings()
        words = self.processor.tokenizer(prompt.question, return_tensors="pt", add_special_tokens=False).input_ids
        rows = [table(torch.tensor([[self.processor.tokenizer.bos_token_id]]))]
        for image in prompt.images:
            alone = self.inputs(Prompt("", (image,)))
            with self.block(setting) as pruning:
                self.model(**alone)
            pixels = {n: t for n, t in alone.items() if n not in ("input_ids", "attention_mask", "mm_token_type_ids")}
            features = self.model.model.get_image_features(**pixels, return_dict=True).pooler_output
            rows.append(torch.cat(list(features))[pruning.kept])
        return torch.cat([*rows, table(words)], 1)


def _sts_structure(
    features: Tensor, k: int, stacked_positions: Tensor, mask: Tensor | None = None, exponent: float = 1.0
) -> Any:
    """The first stage of sts, which is no method of its own."""
    from tokenprune_kernels.methods import sts_structure

    return sts_structure(features, k, positions=stacked_positions, mask=mask, exponent=exponent)


def difference(engine: Answer, logits: Tensor) -> float:
    """The largest of the log-probabilities that the engine told."""
    expected = torch.log_softmax(logits.double(), -1)
    return max(
        abs(float(row[token]) - value)
        for row, told in zip(expected, engine.logprobs, strict=True)
        for token, value in told.items()
    )
