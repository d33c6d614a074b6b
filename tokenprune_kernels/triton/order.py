"""The contract's order of candidates as Triton code: better value first, ties to the lower index, NaN last.

Values become unsigned 32-bit keys: the larger key is the better candidate. NaN gets the key 1, whatever its sign and
payload, and a masked token 0, so that neither needs code of its own afterwards; -0.0 and 0.0 get the same key.
"""

import triton
import triton.language as tl


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
def key_with_index(key, index):
    """uint32 key and position -> one int64 whose maximum is the best candidate: equal keys go to the lower index."""
    # The key's upper bit would be the sign: shifted by 31 the maximum over signed integers is the right one.
    return (key.to(tl.int64) << 31) | (0x7FFFFFFF - index.to(tl.int64))


@triton.jit
def index_of(best):
    """The position in a value of `key_with_index`, or -1 where its key says that no candidate was valid."""
    return tl.where((best >> 31) == 0, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF))
