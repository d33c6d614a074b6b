"""select_mixture (AdaFV): one launch, one program per sample.

    text scores ---> keys --- the k - b best (radix.best_of) --- sorted --- prefix sums of all after the first b --+
    visual scores -> keys --- the same -------------------------------------------------------------------------> r
    indices, counts <--- the k best of: tokens kept by either list on top, then by share <--- the b + r best of the
                         text list and the b + R - r best of the visual list

b places of each list are reserved, R = k - 2b are shared out. Only keys are sorted: the first m of a list are its m best,
which the radix selection finds again. A score comes back from its key, so that nothing but keys is kept of the scores.

Prefix sums are float64 scans. They stop where a list has no mass left (sorted, its zeros are the last): the sums from
there on are one number, bit by bit, whatever the order of additions, so that the products that they make equal are equal
and the smallest r wins. Both lists run through the same code with the same blocks: equal lists give equal sums.

Grid B. Scores and mask are read once. In memory, per sample: sorted keys (4 bytes a place, twice as many places where
the sort runs in memory), prefix sums (8 bytes a place), both for two lists; where a sample does not fit one block (4096
tokens) also both keys (8 bytes) and the shares (8 bytes) of all tokens.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _fakes
from .order import order_key
from .radix import TOP_64, best_of, is_chosen, load_keys, pack, select_config, write_selection
from .runtime import Config, check_not_float64, fresh, launch, mask_rows, power_of_two, rows, workspace
from .topk import check_tokens, keys_workspace

LARGEST_SORT = 4096  # keys sorted in registers; more of them in memory


def mixture_config(n: int, listed: int) -> Config:
    """Blocks as for the other selections; PLACES keys are sorted in registers, 0 says that they are too many."""
    config = select_config(n)
    places = 0 if listed > LARGEST_SORT else power_of_two(listed, 32, LARGEST_SORT)
    return Config({**config.blocks, "PLACES": places}, num_warps=8 if places > 1024 else config.num_warps)


@triton.jit
def _list_keys(scores_ptr, mask_ptr, start, n, BLOCK_N: tl.constexpr):
    """Keys of one list: negative scores and NaN count as 0."""
    offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
    valid = offset < n
    score = tl.load(scores_ptr + offset, mask=valid, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + offset, mask=valid, other=0) != 0)
    return order_key(tl.where(score > 0, score, 0.0), valid, True)


@triton.jit
def _score(keys):
    """The score behind a key as float64, 0 for a masked token."""
    score = (keys ^ 0x80000000).to(tl.float32, bitcast=True)
    return tl.where(keys == 0, 0.0, score).to(tl.float64)


@triton.jit
def _sort_in_registers(keys, PLACES: tl.constexpr):
    """Bitonic network, greatest first. Run-time loops: unrolled, its code would be long and slow to compile."""
    place = tl.arange(0, PLACES)
    size = 2
    while size <= PLACES:
        stride = size // 2
        while stride > 0:
            other = tl.gather(keys, place ^ stride, 0)
            greater = ((place & stride) == 0) == ((place & size) == 0)
            keys = tl.where((other > keys) == greater, other, keys)
            stride = stride // 2
        size *= 2
    return keys


@triton.jit
def _sort_in_memory(keys_ptr, count, BLOCK_N: tl.constexpr):
    """The same network over `count` unsigned keys in int32 memory, which has room for the next power of two."""
    places = 2
    while places < count:
        places *= 2
    for start in range(count, places, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        tl.store(keys_ptr + place, tl.full([BLOCK_N], 0, tl.int32), mask=place < places)
    tl.debug_barrier()  # each pair may have been written by other threads than compare it, here and in every stage
    size = 2
    while size <= places:
        stride = size // 2
        while stride > 0:
            for start in range(0, places // 2, BLOCK_N):
                pair = start + tl.arange(0, BLOCK_N)
                inside = pair < places // 2
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
        place = start + tl.arange(0, BLOCK_N)
        counted = (place >= reserved) & (place < listed)
        score = tl.where(counted, _score(keys), 0.0)
        mass = total + tl.cumsum(score, 0)
        tl.store(mass_ptr + (place - reserved + 1), mass, mask=counted)
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
def _fill_keys(text, visual, position, text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight):
    """64-bit keys: what either list keeps on top, then by the greater share, 0 for a masked token."""
    of_text = tl.where(text_weight > 0, _score(text) * text_weight, 0.0)
    of_visual = tl.where(visual_weight > 0, _score(visual) * visual_weight, 0.0)
    share = tl.where(of_text > of_visual, of_text, of_visual)
    kept = is_chosen(text, position, text_key, text_cut) | is_chosen(visual, position, visual_key, visual_cut)
    # The bits of numbers that are not negative are in their order.
    key = tl.where(kept, TOP_64, share.to(tl.int64, bitcast=True) + 1)
    return tl.where(text == 0, 0, key).to(tl.int64)


@triton.jit
def mixture_kernel(
    text_ptr, visual_ptr, mask_ptr, indices_ptr, counts_ptr, num_text_ptr, keys_ptr, fill_ptr, sorted_ptr, mass_ptr,
    n, k, reserved, sorted_room, mass_room, text_stride, visual_stride, mask_stride,
    PLACES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    text_ptr += sample * text_stride
    visual_ptr += sample * visual_stride
    sorted_ptr += 2 * sample * sorted_room
    mass_ptr += 2 * sample * mass_room
    if mask_ptr is not None:
        mask_ptr += sample * mask_stride
    rest = k - 2 * reserved

    if keys_ptr is None:
        text = _list_keys(text_ptr, mask_ptr, 0, n, BLOCK_N)
        visual = _list_keys(visual_ptr, mask_ptr, 0, n, BLOCK_N)
        visual_keys_ptr = None
        text_sum, visual_sum = tl.sum(_score(text), 0), tl.sum(_score(visual), 0)
    else:
        text, visual = None, None
        keys_ptr += 2 * sample * n
        fill_ptr += sample * n
        visual_keys_ptr = keys_ptr + n
        text_sum, visual_sum = tl.full([], 0, tl.float64), tl.full([], 0, tl.float64)
        for start in range(0, n, BLOCK_N):
            offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
            block = _list_keys(text_ptr, mask_ptr, start, n, BLOCK_N)
            text_sum += tl.sum(_score(block), 0)
            tl.store(keys_ptr + offset, block.to(tl.int32, bitcast=True), mask=offset < n)
            block = _list_keys(visual_ptr, mask_ptr, start, n, BLOCK_N)
            visual_sum += tl.sum(_score(block), 0)
            tl.store(visual_keys_ptr + offset, block.to(tl.int32, bitcast=True), mask=offset < n)
        tl.debug_barrier()  # the keys are read by other threads than wrote them

    # How many of each list: what lies after the reserved ones, sorted and summed up.
    text_count = 0
    visual_count = 0
    for which in range(2):
        held = None
        list_ptr = keys_ptr
        if keys_ptr is None:
            held = tl.where(which == 0, text, visual)
        else:
            list_ptr = keys_ptr + which * n
        places_ptr = sorted_ptr + which * sorted_room
        key, cut = best_of(held, list_ptr, n, k - reserved, tl.uint32, BLOCK_N)
        listed = pack(held, list_ptr, n, key, cut, places_ptr, sorted_room, False, BLOCK_N)
        tl.debug_barrier()  # the list is sorted by other threads than wrote it
        if PLACES > 0:
            sorted_keys = _sort_in_registers(load_keys(places_ptr, 0, listed, PLACES), PLACES)
            count = _prefix_sums(sorted_keys, None, listed, reserved, mass_ptr + which * mass_room, PLACES)
        else:
            _sort_in_memory(places_ptr, listed, BLOCK_N)
            count = _prefix_sums(None, places_ptr, listed, reserved, mass_ptr + which * mass_room, BLOCK_N)
        text_count = tl.where(which == 0, count, text_count)
        visual_count = count
    tl.debug_barrier()  # the sums are read in another order than they were written in
    split = _best_split(mass_ptr, text_count, mass_ptr + mass_room, visual_count, rest, BLOCK_N)
    tl.store(num_text_ptr + sample, (split + reserved).to(tl.int64))

    text_key, text_cut = best_of(text, keys_ptr, n, split + reserved, tl.uint32, BLOCK_N)
    visual_key, visual_cut = best_of(visual, visual_keys_ptr, n, k - reserved - split, tl.uint32, BLOCK_N)
    text_weight, visual_weight = _weight(text_sum, visual_sum), _weight(visual_sum, text_sum)
    if keys_ptr is None:
        fill = _fill_keys(
            text, visual, tl.arange(0, BLOCK_N), text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight
        )
    else:
        fill = None
        for start in range(0, n, BLOCK_N):
            position = start + tl.arange(0, BLOCK_N)
            block = _fill_keys(
                load_keys(keys_ptr, start, n, BLOCK_N), load_keys(visual_keys_ptr, start, n, BLOCK_N),
                position, text_key, text_cut, visual_key, visual_cut, text_weight, visual_weight,
            )  # fmt: skip
            tl.store(fill_ptr + position.to(tl.int64), block, mask=position < n)
        tl.debug_barrier()  # as for the keys
    key, cut = best_of(fill, fill_ptr, n, k, tl.int64, BLOCK_N)
    write_selection(fill, fill_ptr, n, key, cut, indices_ptr + sample * k, counts_ptr + sample, k, BLOCK_N)


def select_mixture(
    text_scores: Tensor, visual_scores: Tensor, k: int, *, floor: float = 0.25, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    indices, counts, num_text = fresh(
        *_fakes.select_mixture(text_scores, visual_scores, k, floor=floor, mask=mask)
    )
    check_not_float64("select_mixture", text_scores=text_scores, visual_scores=visual_scores)
    check_tokens("select_mixture", "text_scores", text_scores.shape[1])
    text, visual, mask = rows(text_scores), rows(visual_scores), mask_rows(mask)
    batch, n = text.shape
    reserved = math.floor(floor * k)
    listed = min(k - reserved, n)
    config = mixture_config(n, listed)
    sorted_room = listed if config.blocks["PLACES"] else 2 * listed
    mass_room = listed + 1
    launch(
        mixture_kernel, (batch,), text,
        text, visual, mask, indices, counts, num_text,
        keys_workspace(text, (batch, 2, n)), keys_workspace(text, (batch, n), torch.int64),
        workspace(text, (batch, 2, sorted_room), torch.int32), workspace(text, (batch, 2, mass_room), torch.float64),
        n, k, reserved, sorted_room, mass_room, text.stride(0), visual.stride(0), 0 if mask is None else mask.stride(0),
        config=config,
    )  # fmt: skip
    return indices, counts, num_text
