"""attention_entropy, attention_scores and cross_attention_scores on Triton: plans and launches of the two passes."""

from torch import Tensor

from .. import _fakes
from .attention_columns import (
    PARTS_CONFIG,
    attention_columns_kernel,
    attention_parts_kernel,
    columns_config,
    kinds_code,
    row_parts,
)
from .attention_rows import attention_combine_kernel, attention_rows_kernel, combine_config, key_splits, rows_config
from .attention_tile import strides, unit_of
from .runtime import (
    batch_stride,
    cdiv,
    check_indices,
    check_not_float64,
    fresh,
    launch,
    mask_rows,
    rows,
    target,
    workspace,
)


def _scale(scale: float | None, cosine: bool, dim: int) -> float:
    return scale if scale is not None else 1.0 if cosine else dim**-0.5


def _positions(query_positions: Tensor | None, causal: bool) -> Tensor | None:
    return rows(query_positions) if causal else None


def _splits(query: Tensor, key: Tensor, block_m: int, block_n: int) -> int:
    """Ranges of keys of the row pass; none where the column pass has a second launch already."""
    if row_parts(query.shape[2]) > 1:
        return 1
    return key_splits(cdiv(query.shape[1] * query.shape[2], block_m), key.shape[2], block_n)


def _row_pass(
    query: Tensor, key: Tensor, entropy: Tensor, lse: Tensor, key_mask: Tensor | None, query_positions: Tensor | None,
    scale: float | None, causal: bool, cosine: bool,
) -> None:  # fmt: skip
    batch, heads, m, dim = query.shape
    key_heads, n = key.shape[1:3]
    if lse.numel() == 0:
        return
    query, key, key_mask = rows(query), rows(key), mask_rows(key_mask)
    positions = _positions(query_positions, causal)
    where, unit = target(query.device), unit_of(query, key)
    vectors = (s // unit for s in (*strides(query), *strides(key)))
    group = heads // key_heads
    config = rows_config(where, query.dtype, dim, unit, group * m)
    tiles = cdiv(group * m, config.blocks["BLOCK_M"])
    splits = _splits(query, key, config.blocks["BLOCK_M"], config.blocks["BLOCK_N"])
    partial = workspace(lse, (batch, heads, m, 3, splits)) if splits > 1 else None
    launch(
        attention_rows_kernel, (batch * key_heads * splits * tiles,), query,
        query, key, key_mask, positions, lse, entropy, partial,
        key_heads, group, m, n, dim // unit, _scale(scale, cosine, dim), splits,
        *vectors, batch_stride(key_mask), batch_stride(positions),
        config=config, CAUSAL=causal, COSINE=cosine, UNIT=unit,
    )  # fmt: skip
    if partial is not None:
        config = combine_config(splits)
        launch(
            attention_combine_kernel, (cdiv(lse.numel(), config.blocks["BLOCK_R"]),), query,
            partial, lse, entropy, batch * heads * m, config=config,
        )  # fmt: skip


def _column_pass(
    query: Tensor, key: Tensor, lse: Tensor, scores: Tensor, key_indices: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_positions: Tensor | None, scale: float | None, causal: bool, cosine: bool,
    head_reduction: str, query_reduction: str,
) -> None:  # fmt: skip
    batch, heads, m, dim = query.shape
    key_heads, n = key.shape[1:3]
    v = scores.shape[-1]
    if scores.numel() == 0:
        return
    query, key, key_mask, query_mask = rows(query), rows(key), mask_rows(key_mask), mask_rows(query_mask)
    key_indices = rows(key_indices)
    positions = _positions(query_positions, causal)
    where, unit = target(query.device), unit_of(query, key)
    vectors = (s // unit for s in (*strides(query), *strides(key)))
    group = heads // max(key_heads, 1)
    config = columns_config(where, query.dtype, dim, unit, m, group, v)
    each = query_reduction == "none"
    kinds = [] if each else query_reduction.split("+")
    wanted = {
        "HEADS": head_reduction, "KINDS": kinds_code(kinds), "R": len(kinds),
        "SUM": "sum" in kinds or "mean" in kinds, "MAX": "max" in kinds, "LAST": "last" in kinds,
    }  # fmt: skip
    out_heads = heads if head_reduction == "none" else 1
    items = key_heads * cdiv(group, config.blocks["GROUP"]) if head_reduction == "none" else 1
    parts = row_parts(m) if wanted["SUM"] or wanted["MAX"] or each else 1
    partial = workspace(scores, (batch, parts, 3, out_heads, v)) if parts > 1 and not each else None
    launch(
        attention_columns_kernel, (batch * items * parts * cdiv(v, config.blocks["BLOCK_N"]),), query,
        query, key, lse, key_indices, query_mask, key_mask, positions, scores, partial,
        key_heads, group, m, n, v, dim // unit, _scale(scale, cosine, dim), parts,
        *vectors, *lse.stride(),
        batch_stride(key_indices), batch_stride(query_mask), batch_stride(key_mask), batch_stride(positions),
        config=config, CAUSAL=causal, COSINE=cosine, UNIT=unit, EACH=each, **wanted,
    )  # fmt: skip
    if partial is not None:
        launch(
            attention_parts_kernel, (batch * cdiv(out_heads * v, PARTS_CONFIG.blocks["BLOCK"]),), query,
            partial, query_mask, scores, heads, out_heads, m, v, parts, batch_stride(query_mask),
            config=PARTS_CONFIG, **wanted,
        )  # fmt: skip


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
) -> tuple[Tensor, Tensor]:
    entropy, lse = fresh(
        *_fakes.attention_entropy(
            query, key, key_mask=key_mask, query_positions=query_positions, scale=scale, causal=causal, cosine=cosine
        )
    )
    check_not_float64("attention_entropy", query=query)
    _row_pass(query, key, entropy, lse, key_mask, query_positions, scale, causal, cosine)
    return entropy, lse


def attention_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
) -> Tensor:
    scores: Tensor = fresh(
        _fakes.attention_scores(
            query, key, lse, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
            query_positions=query_positions, scale=scale, causal=causal, cosine=cosine, head_reduction=head_reduction,
            query_reduction=query_reduction,
        )
    )  # fmt: skip
    check_not_float64("attention_scores", query=query)
    if key_indices is not None:
        check_indices("attention_scores", "key_indices", key_indices, key.shape[2])
    _column_pass(
        query, key, lse, scores, key_indices, query_mask, key_mask, query_positions, scale, causal, cosine,
        head_reduction, query_reduction,
    )  # fmt: skip
    return scores


def cross_attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    key_indices: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    cosine: bool = False,
    head_reduction: str = "mean",
    query_reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    scores, entropy, lse = fresh(
        *_fakes.cross_attention_scores(
            query, key, key_indices=key_indices, query_mask=query_mask, key_mask=key_mask,
            query_positions=query_positions, scale=scale, causal=causal, cosine=cosine, head_reduction=head_reduction,
            query_reduction=query_reduction,
        )
    )  # fmt: skip
    check_not_float64("cross_attention_scores", query=query)
    if key_indices is not None:
        check_indices("cross_attention_scores", "key_indices", key_indices, key.shape[2])
    _row_pass(query, key, entropy, lse, key_mask, query_positions, scale, causal, cosine)
    _column_pass(
        query, key, lse, scores, key_indices, query_mask, key_mask, query_positions, scale, causal, cosine,
        head_reduction, query_reduction,
    )  # fmt: skip
    return scores, entropy, lse
