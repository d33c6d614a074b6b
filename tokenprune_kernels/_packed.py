"""What the functions of `varlen` share: where a packed batch is cut, checked, and the way to padded tensors and back.

No value of cu_seqlens reaches the host but on the CPU, to be checked. Elsewhere bad ones give wrong results without
reading memory out of bounds: tokens outside the batch are no entries to gather_compact.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._backend import served_by
from ._checks import check_count, dtype_name, fail, shape_text


class Cut(NamedTuple):
    """Sequence b of a packed batch has the tokens bounds[b] to bounds[b + 1] - 1, `longest` at most."""

    bounds: Tensor  # [B + 1] int64
    tokens: int
    longest: int

    @property
    def batch(self) -> int:
        return self.bounds.shape[0] - 1


def check_packed(op: str, name: str, t: Tensor, letters: str) -> None:
    """A tensor whose shape the letters name."""
    if not isinstance(t, Tensor):
        fail(TypeError, op, name, "be a tensor", "None" if t is None else type(t).__name__)
    if t.dim() != len(letters.split()):
        fail(ValueError, op, name, f"have shape [{', '.join(letters.split())}]", shape_text(t))


def check_beside(op: str, name: str, t: Tensor, dtype: torch.dtype, size: int, like: Tensor) -> None:
    """A tensor [size] beside `like`."""
    check_packed(op, name, t, "T")
    if t.dtype != dtype:
        fail(TypeError, op, name, f"be {dtype_name(dtype)}", dtype_name(t.dtype))
    if t.shape[0] != size:
        fail(ValueError, op, name, f"have shape [{size}]", shape_text(t))
    if t.device != like.device:
        fail(ValueError, op, name, f"be on {like.device}", t.device)


def cut(op: str, name: str, cu_seqlens: Tensor, packed: Tensor, longest: int | None = None) -> Cut:
    """From cu_seqlens [B + 1] int32 of a packed tensor [T, ...], with sequences of at most `longest` tokens."""
    tokens = packed.shape[0]
    check_packed(op, name, cu_seqlens, "B+1")
    if cu_seqlens.dtype != torch.int32:
        fail(TypeError, op, name, "be int32, as FlashAttention's", dtype_name(cu_seqlens.dtype))
    if cu_seqlens.shape[0] < 1:
        fail(ValueError, op, name, "have B + 1 >= 1 entries", shape_text(cu_seqlens))
    if cu_seqlens.device != packed.device:
        fail(ValueError, op, name, f"be on {packed.device}", cu_seqlens.device)
    found = Cut(cu_seqlens.long(), tokens, tokens if longest is None else longest)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(op, name, found)
    return found


def _check_values(op: str, name: str, found: Cut) -> None:
    bounds = found.bounds.tolist()
    if bounds[0] != 0:
        fail(ValueError, op, name, "begin with 0", bounds[0])
    if bounds[-1] > found.tokens:
        fail(ValueError, op, name, f"end within the {found.tokens} tokens", bounds[-1])
    for begin, end in itertools.pairwise(bounds):
        if end < begin:
            fail(ValueError, op, name, "not descend", f"{end} after {begin}")
        if end - begin > found.longest:
            fail(ValueError, op, name, f"have sequences of at most {found.longest} tokens", end - begin)


def sequences(c: Cut) -> Tensor:
    """[tokens] int64: the sequence of each token; B for those behind the last one."""
    tokens = torch.arange(c.tokens, device=c.bounds.device)
    return torch.searchsorted(c.bounds[1:], tokens, right=True)


def slots(c: Cut) -> Tensor:
    """[B, longest] int64: the token in each slot of the padded batch, -1 where there is none."""
    token = c.bounds[:-1, None] + torch.arange(c.longest, device=c.bounds.device)
    return torch.where((token < c.bounds[1:, None]) & (token < c.tokens), token, -1)


def pad(c: Cut, tensors: Sequence[Tensor], dims: Sequence[int], at: Tensor, backend: str | None) -> list[Tensor]:
    """[..., T, ...] -> [B, ..., longest, ...] for each tensor, in one launch; `at` are the slots' tokens."""
    each = [t.detach().expand(c.batch, *t.shape) for t in tensors]
    return ops.gather_compact(each, at, dims=[d + 1 for d in dims], backend=backend)


def pack(c: Cut, padded: Sequence[Tensor], backend: str | None) -> list[Tensor]:
    """[B, ..., longest] -> [..., T] for each tensor, in one launch; tokens of no sequence get 0."""
    sequence = sequences(c)
    index = torch.arange(c.tokens, device=c.bounds.device) - c.bounds[sequence]  # in its sequence
    inside = (sequence < c.batch) & (index >= 0) & (index < c.longest)
    at = torch.where(inside, sequence * c.longest + index, -1)
    rows = [t.movedim(0, -2).flatten(-2)[None] for t in padded]  # [1, ..., B longest]
    return [t[0] for t in ops.gather_compact(rows, at[None], dims=[-1] * len(rows), backend=backend)]


def attend(
    name: str, query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, causal: bool, key_mask: Tensor | None, query_positions: Tensor | None,
    query_mask: Tensor | None = None, lse: Tensor | None = None, backend: str | None = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """What the attention op of this name gives of every sequence, packed."""
    op = f"varlen.{name}"
    check_packed(op, "query", query, "Tq Hq D")
    check_packed(op, "key", key, "Tk Hkv D")
    check_count(f"tokenprune::{op}", "max_seqlen_q", max_seqlen_q)
    check_count(f"tokenprune::{op}", "max_seqlen_k", max_seqlen_k)
    rows = cut(op, "cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q)
    keys = cut(op, "cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k)
    if keys.batch != rows.batch:
        fail(ValueError, op, "cu_seqlens_k", f"have shape [{rows.batch + 1}] as cu_seqlens_q", shape_text(cu_seqlens_k))
    of_rows: dict[str, Tensor] = {"query": query}
    if query_mask is not None:
        check_beside(op, "query_mask", query_mask, torch.bool, rows.tokens, query)
        of_rows["query_mask"] = query_mask
    if causal and query_positions is not None:
        check_beside(op, "query_positions", query_positions, torch.int64, rows.tokens, query)
        of_rows["query_positions"] = query_positions
    if lse is not None:
        check_packed(op, "lse", lse, "Hq Tq")
        if lse.shape[1] != rows.tokens:
            fail(ValueError, op, "lse", f"have shape [Hq, Tq] = [any, {rows.tokens}]", shape_text(lse))
        of_rows["lse"] = lse
    of_keys = {"key": key}
    if key_mask is not None:
        check_beside(op, "key_mask", key_mask, torch.bool, keys.tokens, key)
        of_keys["key_mask"] = key_mask
    options = {**options, "causal": causal, "backend": backend}
    serving = served_by(name, query) if backend in (None, "auto") else backend
    one_by_one = serving == "cpu" and rows.batch > 0 and not torch.compiler.is_compiling()
    return (_each if one_by_one else _padded)(getattr(ops, name), rows, keys, of_rows, of_keys, options)


def _dim(name: str) -> int:
    """Where a packed argument has its tokens."""
    return 1 if name == "lse" else 0


def _listed(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _each(
    attention: Callable[..., Any], rows: Cut, keys: Cut, of_rows: dict[str, Tensor], of_keys: dict[str, Tensor],
    options: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """On the CPU, where the host sees where sequences begin: a call for each, on views."""
    parts: list[list[Tensor]] = []
    for cuts in zip(itertools.pairwise(rows.bounds.tolist()), itertools.pairwise(keys.bounds.tolist()), strict=True):
        own: dict[str, Any] = {}
        for named, (begin, end) in zip((of_rows, of_keys), cuts, strict=True):
            own.update({n: t.narrow(_dim(n), begin, end - begin)[None] for n, t in named.items()})
        own["query"], own["key"] = own["query"].transpose(1, 2), own["key"].transpose(1, 2)
        parts.append(_listed(attention(**own, **options)))
    packed = []
    for i, part in enumerate(parts[0]):
        side = keys if i == 0 and attention is not ops.attention_entropy else rows
        tail = part.new_zeros(*part.shape[:-1], side.tokens - int(side.bounds[-1]))
        packed.append(torch.cat([*(results[i] for results in parts), tail], -1)[0])
    return packed


def _padded(
    attention: Callable[..., Any], rows: Cut, keys: Cut, of_rows: dict[str, Tensor], of_keys: dict[str, Tensor],
    options: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """One call on padded tensors, made by one launch for the rows and one for the keys."""
    backend = options["backend"]
    made: dict[str, Any] = {}
    for side, named in ((rows, of_rows), (keys, of_keys)):
        at = slots(side)
        made["key_mask" if side is keys else "query_mask"] = at >= 0
        made.update(zip(named, pad(side, list(named.values()), [_dim(n) for n in named], at, backend), strict=True))
    made["query"], made["key"] = made["query"].transpose(1, 2), made["key"].transpose(1, 2)
    if options["causal"] and "query_positions" not in of_rows:  # the last row of a sequence sees all of its keys
        first = keys.bounds.diff() - rows.bounds.diff()
        made["query_positions"] = first[:, None] + torch.arange(rows.longest, device=rows.bounds.device)
    if attention is ops.attention_entropy:
        del made["query_mask"]  # every row has an entropy
        return pack(rows, _listed(attention(**made, **options)), backend)
    scores, *others = _listed(attention(**made, **options))
    return [*pack(keys, [scores], backend), *(pack(rows, others, backend) if others else [])]
