"""The proof of every family, by the list in testing/proofs.py: with every method nothing dropped changes no bit, and
something dropped equals the float64 path."""

import functools
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from testing import ROOT, family_table
from testing.pages import section
from testing.proofs import EVERY, PROOFS, Proof
from tests.transformers.vlm import oracle
from tests.transformers.vlm.checks import RENUMBERED, WITHOUT_MERGING, options_of
from tests.transformers.vlm.models import Prompts
from tests.transformers.vlm.runs_crops import BATCHES, banned, generate, pruned
from tokenprune_kernels.integrations.transformers import prune_visual_tokens, registry


def function(name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(import_module(f"tests.transformers.vlm.{module}"), attribute)


@functools.cache
def built(batch: str) -> Prompts:
    """Shared by all tests: leaving a block restores the model."""
    name, _, images = batch.partition(":")
    try:
        prompts: Prompts = function(name)(BATCHES.get(images, images)) if images else function(name)()
    except ImportError as lacking:
        pytest.skip(f"transformers {transformers.__version__}: {lacking}")
    return prompts


@functools.cache
def exact(batch: str) -> Prompts:
    return oracle.in_float64(built(batch))


@functools.cache
def unpruned(batch: str) -> tuple[Tensor, Tensor]:
    """Two new tokens and their logits, before any block."""
    return generate(built(batch), 2)


def visual_tokens(prompts: Prompts) -> Tensor:
    """[B, L] bool."""
    return torch.isin(prompts.inputs["input_ids"], torch.tensor(prompts.visual))


@functools.cache
def rounding(batch: str, path: str) -> float:
    """The largest difference of the unpruned model's logits from those of the float64 path that drops nothing."""
    prompts = built(batch)
    real = prompts.inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = prompts.model(**prompts.inputs).logits - function(path)(prompts, [], exact=exact(batch))
    return float(logits[real].abs().max())


def runs(first_batch: bool = False) -> list[Any]:
    return [
        pytest.param(proof, batch, method, id=f"{batch}-{method}")
        for proof in PROOFS
        for batch in (proof.batches[:1] if first_batch else proof.batches)
        for method in EVERY
        if method not in proof.refuses
    ]


@pytest.mark.parametrize(("proof", "batch", "method"), runs(first_batch=True))
def test_keeping_all_tokens_changes_no_bit(proof: Proof, batch: str, method: str) -> None:
    prompts = built(batch)
    assert prompts.model.config.model_type == proof.model_type
    tokens, logits = unpruned(batch)
    options = WITHOUT_MERGING.get(method, {})  # at the layers of the papers, or where the method can choose
    with prune_visual_tokens(prompts.model, method, 1.0, seed=5, **options) as pruning:
        same_tokens, same_logits = generate(prompts, 2)
    assert torch.equal(same_logits, logits)
    assert torch.equal(same_tokens, tokens)
    assert pruning.stats["after"] == pruning.stats["before"] == visual_tokens(prompts).sum(1).tolist()


@pytest.mark.parametrize(("proof", "batch", "method"), runs())
def test_logits_and_greedy_tokens_equal_the_float64_path(proof: Proof, batch: str, method: str) -> None:
    prompts = built(batch)
    # The first batch at the layers of the papers, in several of some methods; the others at one that all have.
    options = WITHOUT_MERGING.get(method, {}) if batch == proof.batches[0] else options_of(method)
    with prune_visual_tokens(prompts.model, method, 0.4, seed=5, **options) as pruning:
        new, logits = generate(prompts, proof.decoded(method, batch))
    before = visual_tokens(prompts).sum(1).tolist()
    assert pruning.stats["before"] == before
    assert pruning.stats["after"] == [round(0.4 * n) for n in before]
    assert (pruning.kept >= 0).sum(1).tolist() == pruning.stats["after"]

    drops = [oracle.Drop(at, oracle.dropped_columns(prompts, kept)) for at, kept in pruning.kept_at.items()]
    renumbered = method in RENUMBERED and not registry.family_of(prompts.model).mrope
    more = {"renumber": renumbered, "exact": exact(batch)}
    expected = function(proof.path)(prompts, drops, new[:, :-1], **more)[:, -new.shape[1] :]
    # Logits are up to 1, those of mRoPE families up to 5.
    assert rounding(batch, proof.path) < 5e-5
    assert (logits - expected).abs().max() < 3 * rounding(batch, proof.path)
    expected[..., banned(prompts)] = -torch.inf
    assert torch.equal(new, expected.argmax(-1))


@pytest.mark.parametrize(
    ("batch", "method", "message"),
    [(proof.batches[0], method, message) for proof in PROOFS for method, message in proof.refuses.items()],
)
def test_what_is_refused_says_why(batch: str, method: str, message: str) -> None:
    prompts = built(batch)
    with pytest.raises(NotImplementedError, match=message), pruned(prompts, method, 0.4):
        generate(prompts, 1)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.batches[0])
def test_the_first_batch_of_a_proof_is_ragged(proof: Proof) -> None:
    prompts = built(proof.batches[0])
    assert not prompts.inputs["attention_mask"].all()
    assert visual_tokens(prompts).any(1).all()


# --- the list ---------------------------------------------------------------------------------------------------------


def test_every_family_is_proven() -> None:
    assert {proof.model_type for proof in PROOFS} == {t for family in registry.families() for t in family.model_types}


def test_the_table_of_the_docs_is_that_of_the_list() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert section(page, "proofs") == family_table.proofs(), "run make readme"
