"""STS's structure against a transcription of our formulas, and both of its stages together."""

import pytest
import torch

from testing.cases import over_backends
from tests.methods import transcriptions
from tests.methods.inputs import (
    Prompt,
    assert_selected,
    batch,
    decided,
    over_dtypes,
    prompt,
    ragged,
    row_scores,
    widest,
)
from tokenprune_kernels.methods import sts_semantics, sts_structure


def _structure(p: Prompt, k: int, **options) -> list[int]:
    features, positions = p.numpy("features", "positions")
    return transcriptions.sts_structure(features, positions, k, **options)


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 9, 30, 33])
def test_structure_minimises_the_potential_energy(k, dtype, backend):
    p, expected = decided(lambda seed: prompt(seed, dtype), lambda p: _structure(p, k))
    kept = sts_structure(p.features[None], k, positions=p.positions[None], backend=backend)
    assert [i for i in kept.details["order"][0].tolist() if i >= 0] == expected
    assert_selected(kept, [expected])


@over_backends
@pytest.mark.parametrize(
    "options", [{"exponent": 2.5}, {"weights": (1.0, 0.0)}, {"weights": (0.5, 3.0)}, {"epsilon": 0.1}], ids=str
)
def test_structure_options(options, backend):
    p, expected = decided(lambda seed: prompt(seed, widest(backend)), lambda p: _structure(p, 12, **options))
    keywords = {n: v for n, v in options.items() if n != "weights"}
    if "weights" in options:
        keywords["feature_weight"], keywords["position_weight"] = options["weights"]
    kept = sts_structure(p.features[None], 12, positions=p.positions[None], backend=backend, **keywords)
    assert_selected(kept, [expected])


@over_backends
def test_structure_without_positions(backend):
    p, expected = decided(
        lambda seed: prompt(seed, torch.float32),
        lambda p: transcriptions.sts_structure(*p.numpy("features"), None, 9),
    )
    assert_selected(sts_structure(p.features[None], 9, backend=backend), [expected])


@over_backends
@over_dtypes
@pytest.mark.parametrize("k", [1, 8, 20, 40])
def test_structure_padding_changes_nothing(k, dtype, backend):
    """The diagonal, too, is that of each sample's own tokens: padded positions lie far outside."""
    prompts, expected = decided(lambda seed: ragged(seed, dtype), lambda ps: [_structure(p, k) for p in ps])
    b = batch(prompts)
    assert_selected(sts_structure(b.features, k, positions=b.positions, mask=b.mask, backend=backend), expected)


@over_backends
def test_structure_does_not_depend_on_the_unit_of_positions(backend):
    """A power of two scales exactly, so that the result is the same to the last bit."""
    p = prompt(3, torch.float32)
    one = sts_structure(p.features[None], 12, positions=p.positions[None].float(), backend=backend)
    other = sts_structure(p.features[None], 12, positions=p.positions[None].float() * 1024, backend=backend)
    assert one.details["order"].tolist() == other.details["order"].tolist()


@over_backends
@pytest.mark.parametrize("dtype", [torch.float64])  # 1 / r**1000 overflows in float32
def test_structure_with_a_large_exponent_is_farthest_point_sampling(dtype, backend):
    p, expected = decided(
        lambda seed: prompt(seed, dtype, grid=(3, 4)),
        lambda p: transcriptions.max_min(*p.numpy("features"), 4, start="outlier", margin=0.01),
    )
    kept = sts_structure(p.features[None], 4, exponent=1000.0, epsilon=0.0, backend=backend)
    assert kept.details["order"][0].tolist() == expected


@over_backends
def test_structure_energy_carries_a_saliency(backend):
    """With a large lambda the energy decides alone: the most salient tokens, best first."""
    p = prompt(0, torch.float32)
    kept = sts_structure(p.features[None], 3, energy=-1e9 * p.saliency[None], backend=backend)
    assert kept.details["order"][0].tolist() == p.saliency.argsort(descending=True)[:3].tolist()


@over_backends
def test_stage_two_on_the_survivors_of_stage_one(backend):
    """Stage 1 gives a -1 padded list of visual tokens; their indices in the prompt are the key_indices of stage 2."""
    prompts = ragged(0, torch.float32)
    b = batch(prompts)
    first = sts_structure(b.features, 20, mask=b.mask, backend=backend)
    indices = torch.where(first.indices >= 0, b.attention["key_indices"].gather(1, first.indices.clamp_min(0)), -1)
    second = sts_semantics(b.query, b.key, 6, **{**b.attention, "key_indices": indices}, backend=backend)
    for sample, p in enumerate(prompts):
        survivors = [i for i in first.indices[sample].tolist() if i >= 0]
        best = transcriptions.best(row_scores(p, "mean")[survivors], range(len(survivors)), 6)
        assert second.indices[sample].tolist() == sorted(best)
