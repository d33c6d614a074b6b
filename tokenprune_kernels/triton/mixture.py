"""select_mixture (AdaFV): b slots are reserved for each list, R = k - 2b are shared out between them.

    list_kernel     scores -> keys -> the k - b best (radix.best_of) -> sorted -> prefix sums of all after the first b
    mixture_kernel  both lists' sums -> r -> the b + r best of the text list, the b + R - r best of the visual one
                    -> these on top, all others by share: the k best of that -> indices in ascending order, counts

Only keys are sorted: the first m tokens of a list are its m best, which the radix selection finds again. A score comes
back from its key, so that mixture_kernel needs nothing but keys and sums.

Prefix sums are float64 scans. They stop where a list has no mass left (sorted, its zeros are the last): the sum from
there on is one number, bit by bit, whatever the order of additions, so that the products that it makes equal are equal
and the smallest r wins. Both lists run through the same code with the same blocks: equal lists give equal sums.

Launches, and what they move beside k indices (8 bytes each):
    list_kernel     grid 2B, a program per list: scores and mask are read once, keys written (4 bytes a token); the list
                    (4 bytes a key) and its sums (8 bytes a key) are written. One kernel for both would do the lists
                    one after the other, and keep more alive than there are registers.
    mixture_kernel  grid B: keys and sums are read once.
A sample of more than 4096 tokens is read block by block: its keys once in each radix pass, its fill keys (8 bytes a
token) too. More than 2048 keys are sorted in memory, in one pass over them for each stage.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .order import TOP_64, is_better, nonnegative_key, nonnegative_value, order_key
from .radix import LARGEST_BLOCK, best_of, check_tokens, load_keys, pack, select_config, write_selection
from .runtime import Config, batch_stride, check_not_float64, fresh, launch, mask_rows, power_of_two, rows, workspace

LARGEST_SORT = 2048  # keys sorted in registers; more of them in memory
SORT_BLOCK = tl.constexpr(1024)  # there, pairs at a time


def list_config(n: int, listed: int) -> Config:
    """Blocks as for the other selections; SORTED keys are sorted in registers, 0 says that they are too many."""
    config = select_config(n)
    in_registers = 0 if listed > LARGEST_SORT else power_of_two(listed, 32, LARGEST_SORT)
    return Config({**config.blocks, "SORTED": in_registers}, num_warps=8 if in_registers > 1024 else config.num_warps)


@triton.jit
def _make_keys(text_ptr, visual_ptr, which, mask_ptr, start, n, BLOCK_N: tl.constexpr):
    """Keys of one list, of the text scores for `which` 0: negative scores and NaN count as 0."""
    offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = offset < n
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + offset, mask=valid, other=0) != 0)
    # The lists may differ in dtype: two loads, of which one reads nothing.
    text_end, visual_end = tl.where(which == 0, n, 0), tl.where(which == 0, 0, n)
    text = tl.load(text_ptr + offset, mask=valid & (offset < text_end), other=0.0).to(tl.float32)
    visual = tl.load(visual_ptr + offset, mask=valid & (offset < visual_end), other=0.0).to(tl.float32)
    score = tl.where(which == 0, text, visual)
    return order_key(tl.where(score > 0, score, 0.0), valid, True)


@triton.jit
def _score(keys):
    return nonnegative_value(keys).to(tl.float64)


@triton.jit
def _sort_in_registers(keys, SORTED: tl.constexpr):
    """Bitonic network, greatest first. Run-time loops: unrolled, its code would be long and slow to compile."""
    slot = tl.arange(0, SORTED)
    size = 2
    while size <= SORTED:
        stride = size // 2
        while stride > 0:
            other = tl.gather(keys, slot ^ stride, 0)
            greater = ((slot & stride) == 0) == ((slot & size) == 0)
            keys = tl.where((other > keys) == greater, other, keys)
            stride = stride // 2
        size *= 2
    return keys


@triton.jit
def _sort_in_memory(keys_ptr, count, BLOCK: tl.constexpr):
    """The same network over `count` unsigned keys in int32 memory, which has room for the next power of two."""
    length = 2
    while length < count:
        length *= 2
    for start in range(count, length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(keys_ptr + slot, tl.full([BLOCK], 0, tl.int32), mask=slot < length)
    tl.debug_barrier()  # each pair may have been written by other threads than compare it, here and in every stage
    size = 2
    while size <= length:
        stride = size // 2
        while stride > 0:
            for start in range(0, length // 2, BLOCK):
                pair = start + tl.arange(0, BLOCK)
                inside = pair < length // 2
                first = 2 * pair - (pair & (stride - 1))
                a = tl.load(keys_ptr + first, mask=inside, other=0).to(tl.uint32, bitcast=True)
                b = tl.load(keys_ptr + first + stride, mask=inside, other=0).to(tl.uint32, bitcast=True)
                swap = inside & ((a < b) == ((first & size) == 0))
                tl.store(keys_ptr + first, b.to(tl.int32, bitcast=True), mask=swap)
                tl.store(keys_ptr + first + stride, a.to(tl.int32, bitcast=True), mask=swap)
            tl.debug_barrier()
            stride = stride // 2
        size *= 2


@triton.jit
def _prefix_sums(held, sorted_ptr, listed, reserved, mass_ptr, BLOCK_N: tl.constexpr):
    """mass[r] = what the first r of a sorted list after the reserved ones add up to; returns how many are not 0."""
    tl.store(mass_ptr, 0.0)
    total = tl.full([], 0, tl.float64)
    nonzero = 0
    for start in range(0, listed, BLOCK_N):
        keys = held if held is not None else load_keys(sorted_ptr, start, listed, BLOCK_N)
        rank = start + tl.arange(0, BLOCK_N)
        counted = (rank >= reserved) & (rank < listed)
        score = tl.where(counted, _score(keys), 0.0)
        mass = total + tl.cumsum(score, 0)
        tl.store(mass_ptr + (rank - reserved + 1), mass, mask=counted)
        total = tl.max(mass, 0)
        nonzero += tl.sum((score > 0).to(tl.int32), 0)
    return nonzero


@triton.jit
def _best_split(text_ptr, text_count, visual_ptr, visual_count, rest, BLOCK_N: tl.constexpr):
    """The smallest r that maximises text(r) * visual(rest - r); 0 * inf counts as 0.

    From text_count and visual_count on the sums stay what they are: an r beyond text_count is never better.
    """
    most = tl.full([BLOCK_N], -1.0, tl.float64)
    split = tl.full([BLOCK_N], 0, tl.int32)
    last = tl.minimum(rest, text_count).to(tl.int32)
    for start in range(0, last + 1, BLOCK_N):
        r = start + tl.arange(0, BLOCK_N)
        text = tl.load(text_ptr + r, mask=r <= last, other=0.0)
        visual = tl.load(visual_ptr + tl.minimum(rest - r, visual_count), mask=r <= last, other=0.0)
        product = text * visual
        product = tl.where(product != product, 0.0, product)
        better = (r <= last) & (product > most)
        most = tl.where(better, product, most)
        split = tl.where(better, r, split)
    best = tl.max(most, 0)
    return tl.min(tl.where(most == best, split, last), 0)


@triton.jit
def _weight(total, other):
    """What a list's scores are multiplied by for shares to compare as scores / total do, without a division.

    A list whose total is 0 or infinite has no shares: 0, and the other list needs no common denominator.
    """
    has_shares = (total > 0) & (total < float("inf"))
    common = tl.where((other > 0) & (other < float("inf")), other, 1.0)
    return tl.where(has_shares, common, 0.0)


@triton.jit
def _fill_keys(text, visual, index, text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight):
    """64-bit keys: what either list keeps on top, then by the greater share, 0 for a masked token."""
    of_text = tl.where(text_weight > 0, _score(text) * text_weight, 0.0)
    of_visual = tl.where(visual_weight > 0, _score(visual) * visual_weight, 0.0)
    share = tl.where(of_text > of_visual, of_text, of_visual)
    kept = is_better(text, index, text_key, text_cut) | is_better(visual, index, visual_key, visual_cut)
    key = tl.where(kept, TOP_64, nonnegative_key(share))
    return tl.where(text == 0, 0, key).to(tl.int64)


@triton.jit
def list_kernel(
    text_ptr, visual_ptr, mask_ptr, keys_ptr, sorted_ptr, sums_ptr,
    n, wanted, reserved, sorted_room, sums_room, text_stride, visual_stride, mask_stride,
    ONE_BLOCK: tl.constexpr, SORTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, which = program // 2, program % 2
    text_ptr += sample * text_stride
    visual_ptr += sample * visual_stride
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    keys_ptr += program * n
    sorted_ptr += program * sorted_room
    sums_ptr += program * sums_room
    held = None
    total = tl.full([], 0, tl.float64)
    if ONE_BLOCK:
        held = _make_keys(text_ptr, visual_ptr, which, mask_ptr, 0, n, BLOCK_N)
    for start in range(0, n, BLOCK_N):
        keys = held if held is not None else _make_keys(text_ptr, visual_ptr, which, mask_ptr, start, n, BLOCK_N)
        total += tl.sum(_score(keys), 0)
        offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(keys_ptr + offset, keys.to(tl.int32, bitcast=True), mask=offset < n)
    tl.store(sums_ptr, total)
    if not ONE_BLOCK:
        tl.debug_barrier()  # the keys are read by other threads than wrote them
    key, cut = best_of(held, keys_ptr, n, wanted, tl.uint32, BLOCK_N)
    listed = pack(held, keys_ptr, n, key, cut, sorted_ptr, sorted_room, False, BLOCK_N)
    tl.debug_barrier()  # the list is sorted by other threads than wrote it
    if SORTED > 0:
        in_order = _sort_in_registers(load_keys(sorted_ptr, 0, listed, SORTED), SORTED)
        nonzero = _prefix_sums(in_order, None, listed, reserved, sums_ptr + 2, SORTED)
    else:
        _sort_in_memory(sorted_ptr, listed, SORT_BLOCK)
        nonzero = _prefix_sums(None, sorted_ptr, listed, reserved, sums_ptr + 2, SORT_BLOCK)
    tl.store(sums_ptr + 1, nonzero.to(tl.float64))


@triton.jit
def mixture_kernel(
    keys_ptr, fill_ptr, sums_ptr, indices_ptr, counts_ptr, num_text_ptr,
    n, k, reserved, sums_room, ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    text_keys_ptr = keys_ptr + 2 * sample * n
    visual_keys_ptr = text_keys_ptr + n
    text_sums_ptr = sums_ptr + 2 * sample * sums_room
    visual_sums_ptr = text_sums_ptr + sums_room
    split = _best_split(
        text_sums_ptr + 2, tl.load(text_sums_ptr + 1).to(tl.int32),
        visual_sums_ptr + 2, tl.load(visual_sums_ptr + 1).to(tl.int32), k - 2 * reserved, BLOCK_N,
    )  # fmt: skip
    tl.store(num_text_ptr + sample, (split + reserved).to(tl.int64))
    text, visual = None, None
    if ONE_BLOCK:
        text, visual = load_keys(text_keys_ptr, 0, n, BLOCK_N), load_keys(visual_keys_ptr, 0, n, BLOCK_N)
    text_key, text_cut = best_of(text, text_keys_ptr, n, split + reserved, tl.uint32, BLOCK_N)
    visual_key, visual_cut = best_of(visual, visual_keys_ptr, n, k - reserved - split, tl.uint32, BLOCK_N)

    text_total, visual_total = tl.load(text_sums_ptr), tl.load(visual_sums_ptr)
    text_weight, visual_weight = _weight(text_total, visual_total), _weight(visual_total, text_total)
    fill = None
    if ONE_BLOCK:
        fill = _fill_keys(
            text, visual, tl.arange(0, BLOCK_N), text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight
        )
    else:
        fill_ptr += sample * n
        for start in range(0, n, BLOCK_N):
            index = start + tl.arange(0, BLOCK_N)
            keys = _fill_keys(
                load_keys(text_keys_ptr, start, n, BLOCK_N), load_keys(visual_keys_ptr, start, n, BLOCK_N),
                index, text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight,
            )  # fmt: skip
            tl.store(fill_ptr + index.to(tl.int64), keys, mask=index < n)
        tl.debug_barrier()  # as for the keys
    key, cut = best_of(fill, fill_ptr, n, k, tl.int64, BLOCK_N)
    write_selection(fill, fill_ptr, n, key, cut, indices_ptr + sample * k, counts_ptr + sample, k, BLOCK_N)


def select_mixture(
    text_scores: Tensor, visual_scores: Tensor, k: int, *, floor: float = 0.25, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    indices, counts, num_text = fresh(*_fakes.select_mixture(text_scores, visual_scores, k, floor=floor, mask=mask))
    check_not_float64("select_mixture", text_scores=text_scores, visual_scores=visual_scores)
    check_tokens("select_mixture", "text_scores", text_scores.shape[1])
    text, visual, mask = rows(text_scores), rows(visual_scores), mask_rows(mask)
    batch, n = text.shape
    reserved = math.floor(floor * k)
    listed = min(k - reserved, n)
    lists, choice = list_config(n, listed), select_config(n)
    one_block = n <= LARGEST_BLOCK
    keys = workspace(text, (batch, 2, n), torch.int32)
    sorted_room = listed if lists.blocks["SORTED"] else 2 * listed
    sums_room = 2 + 1 + listed
    sums = workspace(text, (batch, 2, sums_room), torch.float64)
    launch(
        list_kernel, (2 * batch,), text,
        text, visual, mask, keys, workspace(text, (batch, 2, sorted_room), torch.int32), sums,
        n, k - reserved, reserved, sorted_room, sums_room,
        text.stride(0), visual.stride(0), batch_stride(mask),
        config=lists, ONE_BLOCK=one_block,
    )  # fmt: skip
    launch(
        mixture_kernel, (batch,), text,
        keys, None if one_block else workspace(text, (batch, n), torch.int64), sums, indices, counts, num_text,
        n, k, reserved, sums_room,
        config=choice, ONE_BLOCK=one_block,
    )  # fmt: skip
    return indices, counts, num_text
