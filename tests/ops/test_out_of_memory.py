"""An op that finds no memory says which op, what it wanted and how many bytes, and works again when there is some."""

from testing.cases import compiled
from testing.op_samples import OPS
from testing.process import printed

# In a process of its own, whose address space ends a little above what it has. Every large allocation is a mapping of
# its own, so that the limit holds for each; the threads are there before the limit is.
SCRIPT = r"""
import re, resource, torch
from testing import op_samples as samples
from testing.op_samples import OPS, Sizes, make, run_op

ATTENTION = Sizes(batch=2, tokens=1500, rows=90, channels=16, heads=8, kv_heads=8, listed=900)
SELECTION = Sizes(batch=5, tokens=50_000, k=30_000)
FEATURES = Sizes(batch=9, tokens=500, rows=250, channels=64, heads=2, k=30, listed=250)

def used():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def under_limit(call, room):
    resource.setrlimit(resource.RLIMIT_AS, (used() + room, -1))
    try:
        return run_op(call), None
    except RuntimeError as error:
        return None, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

def assert_same(got, want):
    assert all(torch.equal(g.nan_to_num(), w.nan_to_num()) for g, w in zip(got, want, strict=True))

for op in OPS:
    tensor = r" \w+ \[[\d, ]*\] \(\d+ bytes\)"
    said = re.compile(
        rf"tokenprune::{op}: out of memory: cannot allocate"
        rf"({tensor} on cpu| \d+ bytes of working memory| working memory for({tensor})+)"
    )
    failed = succeeded = 0
    for name in samples.FACTORIES[op]:
        sizes = ATTENTION if "attention" in op else FEATURES if "channels" in samples.SIZES_OF[op] else SELECTION
        call = make(op, name, sizes)
        if name != "plain":  # rows that have to be copied
            call = samples.map_tensors(call, lambda _, t: t.transpose(0, -1).contiguous().transpose(0, -1))
        want = run_op(call)
        for room in (0, *(2**bits for bits in range(17, 29))):
            got, error = under_limit(call, room)
            if error is None:
                succeeded += 1
                assert_same(got, want)
            else:
                failed += 1
                assert said.search(error), error
            del got
        assert_same(run_op(call), want)
    print(op, failed, succeeded)
"""


@compiled
def test_failed_allocations_name_the_op_and_what_it_wanted() -> None:
    told = printed("-c", SCRIPT, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="2")
    seen = {op: (int(failed), int(succeeded)) for op, failed, succeeded in map(str.split, told.splitlines())}
    assert set(seen) == set(OPS)
    assert all(failed and succeeded for failed, succeeded in seen.values()), f"the limit made no difference: {seen}"
