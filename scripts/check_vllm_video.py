"""EVS and VidCom2 of an installed vLLM against ours: the same tokens of many videos, what both take, the same answers.

`python -m scripts.check_vllm_video`, where vLLM is installed. It prints three tables, and fails when ours keep others
than the engine keeps of a float32 video, or than it keeps of a bfloat16 video converted to float64, or when the engine
answers otherwise. Tokens whose scores are equal up to the rounding of float32 count as the same.
"""

import importlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokenprune_kernels.integrations.retention import MASK
from tokenprune_kernels.integrations.vllm.video import SERVED_BY, register_video, unregister_video
from tokenprune_kernels.methods import evs, vidcom2

from . import vllm_video_engine

Size = tuple[int, int, int]
Functions = dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]  # the engine's and ours, by method
# Frames, rows and columns behind the encoder, where 2 x 2 patches become one token; then the channels.
SHAPES = [((1, 8, 12), 64), ((2, 4, 4), 33), ((5, 12, 16), 128), ((16, 16, 20), 96), ((24, 8, 8), 256)]
SHAPES += [((8, 28, 28), 512)]
RATES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MERGE = 2
DTYPES = (torch.float32, torch.bfloat16)
TIE = 1e-6  # scores no further apart are a tie, which float32 decides by its order of summation
CALLERS = ("qwen2_5_vl", "qwen3_vl", "nano_nemotron_vl")
TIMED = [((16, 28, 28), 2048), ((64, 20, 20), 3584)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def videos(size: Size, channels: int, seed: int) -> dict[str, Tensor]:
    """[V, C] float32 of several kinds, by name."""
    frames, area = size[0], size[1] * size[2] // MERGE**2
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, area, channels, generator=g)
    scene = torch.randn(1, area, channels, generator=g)
    steps = noise * torch.rand(frames, area, 1, generator=g) * 0.2
    still = torch.rand(frames, area, 1, generator=g) < 0.7
    kinds = {
        "unlike frames": noise,
        "slow change": scene + steps.cumsum(0),
        "still background": scene + torch.where(still, 0, steps).cumsum(0),
        "one frame repeated": scene.expand_as(noise),
    }
    return {name: video.reshape(-1, channels).contiguous() for name, video in kinds.items()}


def exact_scores(method: str, video: Tensor, size: Size) -> Tensor:
    """What the method selects by, [V] in float64."""
    area = size[1] * size[2] // MERGE**2
    groups = torch.arange(size[0]).repeat_interleave(area)[None]
    if method == "evs":
        grid = (size[1] // MERGE, size[2] // MERGE)
        return evs(video.double()[None], groups, 1, grid=grid, backend="reference").details["dissimilarity"][0]
    return vidcom2(video.double()[None], groups, 1, backend="reference").details["redundancy"][0]


def gap(scores: Tensor, a: Tensor, b: Tensor) -> float:
    """How far the scores of what two masks keep are apart, in ascending order; 0: they differ in exact ties alone."""
    apart = scores[a & ~b].sort().values - scores[b & ~a].sort().values
    return float(apart.abs().max()) if len(apart) else 0.0


def compare(functions: Functions) -> bool:
    """The table of tokens, and whether ours are the right ones."""
    print("| method | dtype | videos | kept | ours = engine | gap | ours = float64 | gap | engine = float64 | gap |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    good = True
    kinds = list(videos(*SHAPES[0], seed=0))
    for (method, (engine, ours)), dtype, kind in itertools.product(functions.items(), DTYPES, kinds):
        total, alike, apart = 0, [0, 0, 0], [0.0, 0.0, 0.0]
        for (i, (size, channels)), q in itertools.product(enumerate(SHAPES), RATES):
            video = videos(size, channels, seed=i)[kind].to(dtype)
            run = {"video_size_thw": size, "spatial_merge_size": MERGE, "q": q}
            own, theirs, exact = ours(video, **run), engine(video, **run), engine(video.double(), **run)
            good &= own.dtype == torch.bool and own.shape == theirs.shape and int(own.sum()) == int(theirs.sum())
            scores = exact_scores(method, video, size)
            total += int(own.sum())
            for n, (a, b) in enumerate(((own, theirs), (own, exact), (theirs, exact))):
                alike[n] += int((a & b).sum())
                apart[n] = max(apart[n], gap(scores, a, b))
        good &= apart[0 if dtype == torch.float32 else 1] < TIE
        told = " | ".join(f"{n} | {g:.1g}" for n, g in zip(alike, apart, strict=True))
        print(f"| {method} | {name_of(dtype)} | {kind} | {total} | {told} |")
    return good


def speed(functions: Functions, rounds: int = 5) -> None:
    """The table of times: CPU time of interleaved calls, the least of each, and the median of their ratios."""
    print("| method | dtype | frames x tokens x channels | engine, ms | ours, ms | engine / ours |")
    print("|---|---|---|---|---|---|")
    for (method, pair), dtype, (size, channels) in itertools.product(functions.items(), DTYPES, TIMED):
        video = videos(size, channels, seed=0)["slow change"].to(dtype)
        took: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for function, times in zip(pair, took, strict=True):
                began = time.process_time()
                function(video, video_size_thw=size, spatial_merge_size=MERGE, q=0.75)
                times.append(1e3 * (time.process_time() - began))
        engine, ours = (times[1:] for times in took)  # the first round warms up
        ratio = statistics.median(e / o for e, o in zip(engine, ours, strict=True))
        shape = f"{size[0]} x {size[1] * size[2] // MERGE**2} x {channels}"
        print(f"| {method} | {name_of(dtype)} | {shape} | {min(engine):.1f} | {min(ours):.1f} | {ratio:.1f}x |")


def rebound() -> bool:
    """Whether the engine's models call ours while it is registered, and their own before and after."""
    models = [importlib.import_module(f"vllm.model_executor.models.{name}") for name in CALLERS]
    names = [(m, n) for m in models for n in (MASK, f"vidcom2_{MASK}") if hasattr(m, n)]
    before = [getattr(m, n) for m, n in names]
    register_video()
    register_video()
    within = [getattr(m, n).__module__ for m, n in names]
    unregister_video()
    after = [getattr(m, n) for m, n in names]
    print(f"\nrebound in {', '.join(f'{m.__name__}.{n}' for m, n in names)}")
    return after == before and set(within) == {"tokenprune_kernels.integrations.retention"}


def main() -> int:
    import vllm

    functions = {}
    own = {module: getattr(importlib.import_module(module), MASK) for module in SERVED_BY}
    register_video()
    for module, engine in own.items():
        functions[module.rpartition(".")[2]] = (engine, getattr(sys.modules[module], MASK))
    unregister_video()
    print(f"vLLM {vllm.__version__}, torch {torch.__version__}\n")
    good = compare(functions)
    print(f"\n{torch.get_num_threads()} threads, CPU time of interleaved calls")
    speed(functions)
    good &= rebound()
    with tempfile.TemporaryDirectory(prefix="tokenprune-vllm-video-") as folder:
        good &= vllm_video_engine.check(Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
