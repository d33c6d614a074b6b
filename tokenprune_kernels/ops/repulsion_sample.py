"""torch.ops.tokenprune.repulsion_sample: its description and its Python function."""

from torch import Tensor

from .._backend import call
from .._op import KERNELS, Budget, Choice, Count, Number, coordinates, counts, flags, floats, indices, op, picks


@op(
    features=floats("B N C"),
    k=Count(),
    positions=coordinates("B N P"),
    seed_indices=indices("B S"),
    energy=floats("B N"),
    mask=flags("B N"),
    potential=Choice(("cosine", "riesz", "gaussian")),
    aggregate=Choice(("max", "sum")),
    feature_weight=Number(0.0),
    position_weight=Number(0.0),
    exponent=Number(0.0, above=True),
    sigma=Number(0.0, above=True),
    epsilon=Number(0.0),
    first=Choice(("outlier", "isolated", "index")),
    returns={"indices": picks("B k", ascending=False), "counts": counts("B")},
    work=("features", "B * N * max(N, S) * max(C, P)"),
    backends=KERNELS,
)
def repulsion_sample(
    features: Tensor,
    k: Budget,
    *,
    positions: Tensor | None = None,
    seed_indices: Tensor | None = None,
    energy: Tensor | None = None,
    mask: Tensor | None = None,
    potential: str = "cosine",
    aggregate: str = "max",
    feature_weight: float = 1.0,
    position_weight: float = 1.0,
    exponent: float = 1.0,
    sigma: float = 1.0,
    epsilon: float = 1e-6,
    first: str = "outlier",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Repeatedly pick the token that the selected ones repel least.

    With r2(i, j) = feature_weight * 2 * (1 - cos(f_i, f_j)) + position_weight * ||p_i - p_j||^2 (the second term only
    with `positions`) and the potential phi(i, j)

    * `cosine`: cos(f_i, f_j),
    * `riesz`: 1 / (r2 ** (exponent / 2) + epsilon),
    * `gaussian`: exp(-r2 / (2 * sigma ** 2)),

    each step picks the available token with the smallest U(i): the `aggregate` (`max` or `sum`) of phi(i, j) over the
    selected j, plus energy(i). Equal U: the lower index; NaN after every number; tokens with a False mask never. The
    picks are exact up to rounding: nothing is drawn at random and nothing is approximated.

    Known methods are special cases: `cosine` + `max` is max-min diversity sampling (DivPrune, arXiv 2503.02175, with
    first="isolated"; ZSPAPrune, arXiv 2510.17197, with the core tokens as seeds), `riesz` + `max` farthest-point
    sampling, `riesz` + `sum` potential-energy minimisation (as in STS, arXiv 2606.03569), `cosine` + `max` with
    energy = -relevance / lambda maximal marginal relevance.

    Args:
        features: [B, N, C], float16, bfloat16, float32 or float64, C >= 1. A zero vector has cosine 0 with everything.
        k: how many to pick, >= 0; may exceed N. Or as in `select_topk` a share of N, or a number for each sample.
        positions: [B, N, P], or [N, P] for all samples alike; any floating dtype, or integers, which become float32.
        seed_indices: [B, S] int64, tokens that count as selected from the start and are never returned; -1 means no
            entry, repetitions count once, a False mask does not matter.
        energy: [B, N], any floating dtype, added to U.
        mask: [B, N] bool, True for the tokens that may be picked; default all.
        potential: `cosine`, `riesz` or `gaussian`.
        aggregate: `max` or `sum`.
        feature_weight, position_weight: weights of the two terms of r2, >= 0.
        exponent: of `riesz`, > 0.
        sigma: of `gaussian`, > 0.
        epsilon: of `riesz`, >= 0; keeps the potential of identical tokens finite.
        first: the first pick when there is neither a seed nor `energy` (with `energy` it is the smallest energy).
            `outlier`: the smallest cosine with the sum of all valid unit vectors; `isolated`: the smallest of the
            largest cosines with another valid token; `index`: the lowest valid index.
        backend: which implementation serves the call; see `use_backend`.

    Returns:
        indices [B, k] int64 in order of selection, -1 after the last, and counts [B] int64, how many were picked:
        the smaller of k and the number of available tokens.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value.
        IndexError: a seed index lies outside [-1, N) (CPU and reference).

    >>> import torch, tokenprune_kernels as tp
    >>> corners = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    >>> tp.repulsion_sample(corners, 3, first="index")  # 1 is too close to 0
    (tensor([[0, 3, 2]]), tensor([3]))
    >>> mask = torch.tensor([[True, True, False, True]])
    >>> tp.repulsion_sample(corners, 3, seed_indices=torch.tensor([[3, -1]]), mask=mask)
    (tensor([[ 0,  1, -1]]), tensor([2]))
    """
    return call(
        "repulsion_sample",
        backend,
        features,
        k,
        positions=positions,
        seed_indices=seed_indices,
        energy=energy,
        mask=mask,
        potential=potential,
        aggregate=aggregate,
        feature_weight=feature_weight,
        position_weight=position_weight,
        exponent=exponent,
        sigma=sigma,
        epsilon=epsilon,
        first=first,
    )
