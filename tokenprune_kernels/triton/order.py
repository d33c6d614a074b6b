"""The order of candidates as Triton code, the twin of csrc/include/tokenprune/order.h.

The higher value is better, equal values go by the lower index, NaN comes after every number, masked tokens never.
Values become unsigned keys: the larger key is the better candidate. NaN gets the key 1, whatever its sign and payload,
and a masked token 0, so that neither needs code of its own afterwards; -0.0 and 0.0 get the same key.
"""

import triton
import triton.language as tl

# Above the keys of all values: what is chosen already.
TOP_32 = tl.constexpr(0xFFFFFFFF)
TOP_64 = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def order_key(value, valid, LARGEST: tl.constexpr):
    """float32 values -> uint32 keys, larger is better; `valid` False gives 0."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)  # -0.0 + 0.0 is 0.0
    # Negative floats order by decreasing bits, positive ones by increasing bits above all negative ones.
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    if not LARGEST:
        key = key ^ 0xFFFFFFFF
    key = tl.where(value != value, 1, key)
    return tl.where(valid, key, 0).to(tl.uint32)


@triton.jit
def reversed_key(key):
    """The keys of order_key(..., True) -> those of the reversed order: NaN stays last, a masked token 0."""
    return tl.where(key <= 1, key, key ^ 0xFFFFFFFF)


@triton.jit
def nonnegative_value(key):
    """The float32 values behind order_key(value, valid, True) of values that are not negative; 0 for a masked token."""
    value = (key ^ 0x80000000).to(tl.float32, bitcast=True)
    return tl.where(key == 0, 0.0, value)


@triton.jit
def nonnegative_key(value):
    """float64 values that are neither negative nor NaN -> int64 keys above 0: their bits are in their order."""
    return value.to(tl.int64, bitcast=True) + 1


@triton.jit
def is_better(key, index, than_key, than_index):
    """Is the candidate (key, index) better than the other one?"""
    return (key > than_key) | ((key == than_key) & (index < than_index))


@triton.jit
def key_with_index(key, index):
    """uint32 key and index -> one int64 whose maximum is the best candidate: equal keys go to the lower index."""
    # The key's upper bit would be the sign: shifted by 31 the maximum over signed integers is the right one.
    return (key.to(tl.int64) << 31) | (0x7FFFFFFF - index.to(tl.int64))


@triton.jit
def index_of(best):
    """The index in a value of `key_with_index`, or -1 where its key says that no candidate was valid."""
    return tl.where((best >> 31) == 0, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF))


@triton.jit
def best_candidate(value, valid, index, LARGEST: tl.constexpr):
    """The best of a block's candidates, as key_with_index."""
    return tl.max(key_with_index(order_key(value, valid, LARGEST), index), 0)
