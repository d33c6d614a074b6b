"""Training on pruned prompts: the loss of the tokens that are left, its gradients, recomputed layers, chosen logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import CLOSE, LAYER, drops_of, options_of, over_four
from tests.transformers.vlm.models import PAD, Prompts, llava
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.integrations.transformers import training as training_module

HOOKS_OUTSIDE = GradientCheckpointingLayer.__call__ is nn.Module.__call__


def labelled() -> tuple[Prompts, Tensor]:
    """Every text token has a label, the first one behind the image too."""
    prompts = llava(2, ragged=True)
    prompts.model.train()
    ids = prompts.inputs["input_ids"]
    return prompts, ids.masked_fill((ids == prompts.visual) | (ids == PAD), -100)


def exact_loss(prompts: Prompts, drops: list[oracle.Drop], labels: Tensor, tokens: int | None = None) -> Tensor:
    """Of the masked path in float64: what each column that is left predicts of the token behind it in the prompt."""
    gone = torch.stack([drop.columns for drop in drops]).any(0) | (prompts.inputs["attention_mask"] == 0)
    with oracle._masking(prompts.model.model.language_model, drops, labels.shape[1]):
        logits = prompts.model(**prompts.inputs, use_cache=False).logits
    following = labels[:, 1:].masked_fill(gone[:, :-1], -100)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), reduction="sum")
    return loss / (int((following != -100).sum()) if tokens is None else tokens)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@over_four
def test_the_loss_and_its_gradients_are_those_of_the_masked_path(method: str) -> None:
    prompts, labels = labelled()
    options = {"positions": "original", **options_of(method)}
    with prune_visual_tokens(prompts.model, method, 9, **options) as pruning:
        out = prompts.model(**prompts.inputs, labels=labels)
        out.loss.backward()
        assert out.logits.shape[1] == labels.shape[1] - 27
        counted = prompts.model(**prompts.inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    exact = oracle.in_float64(prompts)
    exact.model.zero_grad()
    drops = drops_of(prompts, pruning, LAYER)
    want = exact_loss(exact, drops, labels)
    want.backward()
    torch.testing.assert_close(out.loss.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(counted.double(), exact_loss(exact, drops, labels, 7), rtol=1e-6, atol=0)
    got, of_exact = gradients(prompts.model), gradients(exact.model)
    largest = max(float(g.abs().max()) for g in of_exact.values())
    assert got.keys() == of_exact.keys()
    for name, grad in got.items():
        scale = float(of_exact[name].abs().max())
        torch.testing.assert_close(
            grad.double(), of_exact[name], rtol=0, atol=1e-5 * scale + 1e-8 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", ["coast", "sts", "random"])
def test_recomputed_layers_give_the_same_gradients(method: str) -> None:
    """The choice is made once, in front of what is recomputed: `random` draws once too, and dropout draws the same."""
    prompts, labels = labelled()
    for layer in prompts.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    found: list[tuple[Tensor, dict[str, Tensor], Any]] = []
    for kind in (None, False, True):  # without, and by both of torch's ways
        prompts.model.gradient_checkpointing_disable()
        if kind is not None:
            prompts.model.gradient_checkpointing_enable({"use_reentrant": kind})
        prompts.model.zero_grad()
        torch.manual_seed(5)
        with prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
            if kind is not None and not HOOKS_OUTSIDE:
                with pytest.raises(NotImplementedError, match="gradient checkpointing must recompute the forward"):
                    prompts.model(**prompts.inputs, labels=labels)
                continue
            loss = prompts.model(**prompts.inputs, labels=labels).loss
            loss.backward()
            assert pruning.stats["prefills"] == 1
        found.append((loss, gradients(prompts.model), pruning.kept))
    (loss, grads, kept), *others = found
    for other_loss, other_grads, other_kept in others:
        assert torch.equal(other_loss, loss)
        assert torch.equal(other_kept, kept)
        assert other_grads.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.equal(other_grads[name], grad), name


def test_checkpointing_that_recomputes_hooks_is_refused_in_training_only() -> None:
    prompts = llava(2)

    class Recomputing(type(prompts.model.model.language_model.layers[0])):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        want = prompts.model(**prompts.inputs).logits
    prompts.model.gradient_checkpointing_enable()
    for layer in prompts.model.model.language_model.layers:
        layer.__class__ = Recomputing
    with torch.no_grad(), prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        assert torch.equal(prompts.model(**prompts.inputs).logits, want)  # eval
        prompts.model.train()
        with pytest.raises(NotImplementedError, match="Recomputing recomputes both"):
            prompts.model(**prompts.inputs)
        prompts.model.gradient_checkpointing_disable()
        assert torch.equal(prompts.model(**prompts.inputs).logits, want)


def test_labels_that_are_shifted_already_and_a_loss_of_ones_own() -> None:
    prompts, labels = labelled()
    seen: list[tuple[int, ...]] = []

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        seen.append(tuple(labels.shape))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        with prune_visual_tokens(prompts.model, "divprune", 9):
            want = prompts.model(**prompts.inputs, labels=labels).loss
            got = prompts.model(**prompts.inputs, labels=labels, shift_labels=shifted).loss
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        prompts.model.loss_function = own
        with prune_visual_tokens(prompts.model, "divprune", 9):
            torch.testing.assert_close(prompts.model(**prompts.inputs, labels=labels).loss, want, rtol=0, atol=1e-6)
        assert prompts.model.loss_function is own
        assert seen == [(2, labels.shape[1] - 27)]


def test_a_head_that_names_no_loss_function_is_refused() -> None:
    prompts, labels = labelled()

    class Other(type(prompts.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    prompts.model.__class__ = Other
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        with pytest.raises(NotImplementedError, match="labels need a loss that Other computes by"):
            prompts.model(**prompts.inputs, labels=labels)
        prompts.model(**prompts.inputs)


# --- logits of some columns -------------------------------------------------------------------------------------------


@over_four
def test_logits_to_keep_are_columns_of_the_prompt(method: str) -> None:
    prompts = llava(2)
    ids = prompts.inputs["input_ids"]
    length = ids.shape[1]
    with torch.no_grad(), prune_visual_tokens(prompts.model, method, 9, **options_of(method)) as pruning:
        every = prompts.model(**prompts.inputs).logits
        last = prompts.model(**prompts.inputs, logits_to_keep=3).logits
        torch.testing.assert_close(last, every[:, -3:], **CLOSE)
        wanted = [torch.tensor([0, 2, length - 2, -1])]
        if training_module._OF_EACH_SAMPLE:
            wanted.append(torch.tensor([[1, length - 1], [length - 4, length - 3]]))
        for columns in wanted:
            rows = torch.where(columns < 0, columns + length, columns).expand(2, -1)
            places = torch.where(rows < 3, rows, rows - 27)
            got = prompts.model(**prompts.inputs, logits_to_keep=columns).logits
            torch.testing.assert_close(got, every.take_along_dim(places.unsqueeze(2), 1), **CLOSE)
        text_alone = {"input_ids": ids[:, -5:], "logits_to_keep": torch.tensor([0, -1])}
        assert prompts.model(**text_alone).logits.shape[1] == 2
        kept = pruning.kept
        assert kept is not None
        dropped = next(v for v in range(36) if v not in kept[0].tolist()) + 3
        with pytest.raises(ValueError, match=r"some of which (were dropped|are at different places)"):
            prompts.model(**prompts.inputs, logits_to_keep=torch.tensor([0, dropped]))
        with pytest.raises(NotImplementedError, match=r"logits_to_keep must be an int or indices .*got torch.bool"):
            prompts.model(**prompts.inputs, logits_to_keep=torch.ones(2, length, dtype=torch.bool))
