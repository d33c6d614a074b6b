"""Tokens by label, as a stable counting sort in which every label has a program of its own and nothing is atomic."""

import triton
import triton.language as tl


@triton.jit
def write_segment(labels_ptr, label, n, tokens_ptr, BLOCK_N: tl.constexpr):
    """Write the tokens with this label, ascending, behind the places of those with a label in [0, label).

    Returns where they start and how many they are. The program's threads see them after a barrier.
    """
    start = 0
    for first in range(0, n, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N).to(tl.int64)
        other = tl.load(labels_ptr + token, mask=token < n, other=-1)
        start += tl.sum(((other >= 0) & (other < label)).to(tl.int32), 0)
    length = 0
    for first in range(0, n, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N).to(tl.int64)
        own = tl.load(labels_ptr + token, mask=token < n, other=-1) == label
        reach = length + tl.cumsum(own.to(tl.int32), 0)
        tl.store(tokens_ptr + (start + reach - 1), token.to(tl.int32), mask=own)
        length = tl.max(reach, 0)
    return start, length
