"""Budgets that a prefill has to stay within: a share of the decoder's FLOPs, or a number of milliseconds.

A decoder layer costs linear * L + square * L ** 2 for a prompt of L tokens: projections and MLP take each token alone,
attention each pair. With T other tokens and V visual ones, of which K_i are left in front of layer i, the decoder costs

    sum over i of  linear_i * (T + K_i) + square_i * (T + K_i) ** 2

and the budget is the largest number of tokens with which that is within the limit. For n equal layers that cost f(L),
and tokens dropped in front of layer l, within the share s of what the whole prompt costs,

    f(T + K) <= c  with  c = (s * n - l) / (n - l) * f(T + V),
    K = floor((sqrt(linear ** 2 + 4 * square * c) - linear) / (2 * square)) - T
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from .budgets import Budget
from .prefill import PlannedStage
from .registry import family_of, unwrapped

# The stages of a method with a budget.
Planned = Callable[[Budget], list[PlannedStage]]


@dataclass(frozen=True)
class Flops:
    """`keep=Flops(0.5)`: as many visual tokens as half of the decoder's FLOPs on the unpruned prompt allow.

    The products of the decoder's layers are counted, two FLOPs for each multiplication with its addition: those of
    linear layers, and attention over all pairs of tokens, as torch.utils.flop_counter has it, although kernels skip
    half of them. Vision tower, embeddings, the vocabulary head, the selection itself and padding are not counted.

    >>> Flops(0.5)
    Flops(share=0.5)
    """

    share: float

    def __post_init__(self) -> None:
        _check_number("Flops", "share", self.share)
        if not 0 < self.share <= 1:
            raise ValueError(f"Flops: share must lie in (0, 1], got {self.share}")


@dataclass(frozen=True)
class Milliseconds:
    """`keep=Milliseconds(80, measured=[(168, 40.0), (616, 150.0)])`: as many visual tokens as 80 ms of prefill allow.

    measured: two lengths of unpruned prompts, in tokens, and how many milliseconds the decoder took for each on the
    user's machine. Both costs of a token, with itself and with the others, follow from them, and that every layer takes
    as long as any other is assumed. Nothing else is measured or known: a length outside the two is refused, and what
    the selection itself takes (`stats`) is not part of it.

    >>> Milliseconds(80, measured=[(168, 40.0), (616, 150.0)]).limit
    80
    """

    limit: float
    measured: Sequence[tuple[int, float]]

    def __post_init__(self) -> None:
        _check_number("Milliseconds", "limit", self.limit)
        if not self.limit > 0:
            raise ValueError(f"Milliseconds: limit must be positive, got {self.limit}")
        if len(self.measured) != 2 or any(len(pair) != 2 for pair in self.measured):
            raise ValueError(f"Milliseconds: measured must be two pairs (tokens, milliseconds), got {self.measured}")
        for value in (value for pair in self.measured for value in pair):
            _check_number("Milliseconds", "measured", value)
        (short, less), (long, more) = sorted(self.measured)
        if not 0 < short < long or not 0 < less < more:
            raise ValueError(
                f"Milliseconds: the longer of the two measured prompts must have taken longer, got {self.measured}"
            )
        if min(self.costs()) < 0:
            raise ValueError(
                f"Milliseconds: measured {less} ms for {short} tokens and {more} ms for {long} do not fit "
                "linear * L + square * L ** 2 with costs that are not negative; measure prompts so long that their "
                "tokens take the time"
            )

    def costs(self) -> tuple[float, float]:
        """linear and square of the whole decoder, through both measured points."""
        (short, less), (long, more) = sorted(self.measured)
        square = (more / long - less / short) / (long - short)
        return less / short - square * short, square


Target = Flops | Milliseconds


def _check_number(name: str, field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {field} must be a number, got {value!r}")


@dataclass(frozen=True)
class Cost:
    """Of each decoder layer."""

    linear: Sequence[float]
    square: Sequence[float]

    def of(self, lengths: Sequence[int]) -> float:
        """What a prefill costs whose layers see so many tokens."""
        return sum(a * n + b * n * n for a, b, n in zip(self.linear, self.square, lengths, strict=True))


def flops_of(decoder: Any) -> Cost:
    """Read from the modules, so that fused projections, adapters and grouped keys count as what they are."""
    config = decoder.config
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise NotImplementedError(
            f"Flops: known for full attention only, and {type(decoder).__name__} has layers of {', '.join(kinds)}; "
            "give keep as a number or a share of the visual tokens"
        )
    linear, square = [], []
    for layer in decoder.layers:
        linear.append(sum(_linear_flops(module) for module in layer.modules()))
        if not linear[-1]:
            raise NotImplementedError(f"Flops: {type(layer).__name__} has no nn.Linear to count")
        square.append(4 * config.num_attention_heads * _head_dim(layer, config))
    return Cost(linear, square)


def _linear_flops(module: nn.Module) -> int:
    """For each token, of the module itself."""
    if isinstance(module, nn.Linear):
        return 2 * module.in_features * module.out_features
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() > 1:
            raise NotImplementedError(
                f"Flops: what {type(module).__name__} does with its {name} is not known (experts, convolutions); give "
                "keep as a number or a share of the visual tokens"
            )
    return 0


def _head_dim(layer: Any, config: Any) -> int:
    return int(getattr(layer.self_attn, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def decoder_flops(model: nn.Module, tokens: int) -> int:
    """The FLOPs of the decoder of a supported model for a prompt of so many tokens, as `Flops` counts them."""
    decoder: Any = (family := family_of(model)).decoder(family.core(unwrapped(model)))
    return int(flops_of(decoder).of([tokens] * len(decoder.layers)))


def budget_within(target: Target, decoder: Any, planned: Planned, least: int | None) -> Budget:
    """The budget with which the stages that `planned` makes of one stay within the target.

    least: what is kept at least, whatever it costs; None: one token, and what cannot be reached is refused.
    """
    depth = len(decoder.layers)
    if isinstance(target, Flops):
        cost = flops_of(decoder)
    else:
        linear, square = target.costs()
        cost = Cost([linear / depth] * depth, [square / depth] * depth)

    def lengths(k: int, visual: int, text: int) -> list[int]:
        """The tokens in front of every layer."""
        stages = {stage.layer: stage.budget for stage in planned(lambda tokens, further=(): [k] * len(tokens))}
        left, found = visual, []
        for layer in range(depth):
            if layer in stages:
                left = min(left, *stages[layer]([visual]))
            found.append(text + left)
        return found

    def kept(visual: int, text: int) -> int:
        most, low = visual, min(visual, least or 1)
        whole = [text + visual] * depth
        limit = target.share * cost.of(whole) if isinstance(target, Flops) else target.limit
        if least is None and cost.of(lengths(low, visual, text)) > limit:
            raise ValueError(
                f"prune_visual_tokens: {target} cannot be reached: a prompt of {visual} visual tokens and {text} "
                f"others takes {cost.of(lengths(low, visual, text)):.4g} with one left, the limit is {limit:.4g}; "
                "prune in front of an earlier layer, give a larger one, or say min_keep="
            )
        while low < most:  # the largest that is within the limit
            middle = (low + most + 1) // 2
            within = cost.of(lengths(middle, visual, text)) <= limit
            low, most = (middle, most) if within else (low, middle - 1)
        if isinstance(target, Milliseconds):
            _check_measured(target, [*whole, *lengths(low, visual, text)])
        return low

    def budget(tokens: Sequence[int], further: Sequence[int] = ()) -> list[int]:
        return [kept(visual, text) if visual else 0 for visual, text in zip(tokens, further, strict=True)]

    return budget


def _check_measured(target: Milliseconds, lengths: Sequence[int]) -> None:
    (short, _), (long, _) = sorted(target.measured)
    if not short <= min(lengths) <= max(lengths) <= long:
        raise ValueError(
            f"Milliseconds: measured are prompts of {short} and {long} tokens, and this one has {max(lengths)}, "
            f"{min(lengths)} behind the pruning; measure a prompt at least as long and one at least as short"
        )
