"""What every selecting kernel shares: the m best of a sample's keys by radix selection, and lists of what was chosen.

A program owns one sample. Its keys (order.py) are `held` in registers where the sample fits one block; otherwise they
lie in global memory and are read block by block. Equal keys are never ordered but counted: "the m best" is a key and an
index, all that is better than these two (order.is_better), so that nothing per token is stored.
"""

import triton
import triton.language as tl

from .._checks import fail
from .order import TOP_32, TOP_64, is_better
from .runtime import Config, power_of_two

LARGEST_BLOCK = 4096


def check_tokens(op: str, name: str, n: int) -> None:
    """Indices and counts have 32 bits."""
    if n >= 2**31:
        fail(ValueError, op, name, "have fewer than 2^31 tokens on a GPU", n)


def select_config(n: int) -> Config:
    """A whole sample in one block up to LARGEST_BLOCK tokens, longer ones in a loop over such blocks.

    Never fewer tokens than threads (of 64-wide warps as well): every lane of the histogram then has keys of its own.
    """
    block = power_of_two(n, 256, LARGEST_BLOCK)
    return Config({"BLOCK_N": block}, num_warps=4 if block <= 1024 else 8)


@triton.jit
def load_keys(keys_ptr, start, n, BLOCK_N: tl.constexpr):
    """The keys of a block, 0 behind the end. Unsigned 32-bit keys are stored in int32 memory."""
    offset = start + tl.arange(0, BLOCK_N).to(tl.int64)
    keys = tl.load(keys_ptr + offset, mask=offset < n, other=0)
    return keys.to(tl.uint32, bitcast=True) if keys.dtype == tl.int32 else keys


@triton.jit
def threshold(held, keys_ptr, n, wanted, KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """The `wanted` best: all keys above the first result, and of those equal to it as many as the second says.

    Radix selection: a histogram of 8 bits tells which of their values the last wanted key has; only keys with these
    bits stay open for the next 8. It ends as soon as all that are open are wanted.
    """
    digits = tl.arange(0, 256)
    asked = tl.minimum(wanted, n).to(tl.int32)
    wanted = asked
    fixed = tl.full([], 0, KEY)
    prefix = tl.full([], 0, KEY)
    shift = KEY.primitive_bitwidth - 8
    undecided = (wanted > 0) & (wanted < n)
    while undecided & (shift >= 0):
        histogram = tl.full([256], 0, tl.int32)
        for start in range(0, n, BLOCK_N):
            keys = held if held is not None else load_keys(keys_ptr, start, n, BLOCK_N)
            digit = (keys >> shift.to(KEY)).to(tl.int32) & 255
            histogram += tl.histogram(digit, 256, mask=(keys != 0) & ((keys & fixed) == prefix))
        reach = tl.cumsum(histogram, 0, reverse=True)  # open keys with this digit or a greater one
        digit = tl.maximum(tl.sum((reach >= wanted).to(tl.int32), 0) - 1, 0)  # 0 too where all together are too few
        # Both counts of this digit in one sum: above it in the upper half, with it in the lower.
        counts = ((reach - histogram).to(tl.int64) << 32) | histogram
        counts = tl.sum(tl.where(digits == digit, counts, 0), 0)
        wanted -= (counts >> 32).to(tl.int32)
        undecided = (counts & 0xFFFFFFFF) > wanted
        prefix |= digit.to(KEY) << shift.to(KEY)
        fixed |= tl.full([], 255, KEY) << shift.to(KEY)
        shift -= 8
    # All of what is open: everything above the number before it. Key 0 is no candidate. None: nothing is above the top.
    top: tl.constexpr = TOP_64 if KEY.primitive_bitwidth == 64 else TOP_32
    key = tl.where(undecided, prefix, tl.where(prefix > 0, prefix, 1).to(KEY) - 1)
    return tl.where(asked > 0, key, top).to(KEY), tl.where(undecided, wanted, 0)


@triton.jit
def best_of(held, keys_ptr, n, wanted, KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """The `wanted` best, or all candidates: a key, and the index before which those equal to it are among them."""
    key, ties = threshold(held, keys_ptr, n, wanted, KEY, BLOCK_N)
    cut = 0
    seen = 0
    start = 0
    while seen < ties:  # ends at the block with the last tie, which exists
        equal = (held if held is not None else load_keys(keys_ptr, start, n, BLOCK_N)) == key
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        index = start + tl.arange(0, BLOCK_N)
        cut = tl.max(tl.where(equal & (rank == ties), index + 1, 0), 0)
        seen = tl.max(rank, 0)
        start += BLOCK_N
    return key, cut


@triton.jit
def pack(held, keys_ptr, n, key, cut, out_ptr, room, INDICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write the indices of the chosen tokens, or their keys, in ascending order of the index; return how many.

    Those from the `room`-th on are counted but not written.
    """
    count = 0
    for start in range(0, n, BLOCK_N):
        keys = held if held is not None else load_keys(keys_ptr, start, n, BLOCK_N)
        index = start + tl.arange(0, BLOCK_N)
        chosen = is_better(keys, index, key, cut)
        reach = count + tl.cumsum(chosen.to(tl.int32), 0)
        value = index.to(tl.int64) if INDICES else keys.to(tl.int32, bitcast=True)
        tl.store(out_ptr + (reach - 1), value, mask=chosen & (reach <= room))
        count = tl.max(reach, 0)
    return count


@triton.jit
def write_selection(held, keys_ptr, n, key, cut, indices_ptr, counts_ptr, k, BLOCK_N: tl.constexpr):
    """A sample's outputs: indices of the chosen tokens, -1 in the slots behind them, and their number."""
    count = tl.minimum(pack(held, keys_ptr, n, key, cut, indices_ptr, k, True, BLOCK_N), k)
    for start in range(count, k, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N).to(tl.int64)
        tl.store(indices_ptr + slot, tl.full([BLOCK_N], -1, tl.int64), mask=slot < k)
    tl.store(counts_ptr, count.to(tl.int64))
