"""The command: read the options, run every method on the picture through the ops and the references, show both."""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import tokenprune_kernels as tp
from tokenprune_kernels import methods

from . import panel
from .features import GRID, TOKENS, Inputs, inputs
from .photo import DemoError, crop_square, load, parse_focus


def _sts(x: Inputs, k: int) -> Tensor:
    """Both stages: spread over the picture first, then by attention among the tokens that are still there."""
    first = methods.sts_structure(x.features, min(TOKENS, 2 * k), positions=x.positions).indices
    (key,) = tp.gather_compact([x.key], first, dims=[2])
    second = methods.sts_semantics(x.query, key, k, causal=False).indices
    return first.gather(1, second)


def _random(x: Inputs, k: int, seed: int) -> Tensor:
    generator = torch.Generator(x.key.device).manual_seed(seed)
    return methods.random(TOKENS, k, generator).indices


class Method(NamedTuple):
    title: str
    note: str
    select: Callable[[Inputs, int, int], Tensor]


# In a language model the text stands behind the image, so a causal mask hides no visual token from it: causal=False.
METHODS = {
    "coast": Method(
        "COAST",
        "what the question attends to, and both ends of the contrast",
        lambda x, k, _: methods.coast(x.query, x.key, x.features, k, causal=False).indices,
    ),
    "sts": Method("STS-style", "spread over the picture, then by attention", lambda x, k, _: _sts(x, k)),
    "adafv": Method(
        "AdaFV",
        "likeness to the question, mixed with attention from all patches",
        lambda x, k, _: methods.adafv(x.text, x.features, x.saliency, k).indices,
    ),
    "zspaprune": Method(
        "ZSPAPrune",
        "a core like the question, then what is least like the rest",
        lambda x, k, _: methods.zspaprune(x.text, x.features, k).indices,
    ),
    "adaptprune": Method(
        "AdaptPrune",
        "attention, weakened near kept look-alikes",
        lambda x, k, _: (
            methods.adaptprune(x.query, x.key, x.features, x.positions, k, grid=(GRID, GRID), causal=False).indices
        ),
    ),
    "fastv": Method(
        "FastV",
        "baseline: attention of the last question token",
        lambda x, k, _: methods.fastv(x.query, x.key, k, causal=False).indices,
    ),
    "divprune": Method(
        "DivPrune",
        "baseline: diversity alone, no question",
        lambda x, k, _: methods.divprune(x.features, k).indices,
    ),
    "random": Method("Random", "baseline: chance", _random),
}


SUBTITLE = "The question: the patches inside the ring. Features: colour and gradient statistics, no trained model."


class Result(NamedTuple):
    kept: Tensor  # [K], ascending
    by_reference: Tensor
    seconds: float
    reference_seconds: float


def parse_keep(text: str) -> int:
    """`128` is a count; `0.22`, with a dot, a share of the patches."""
    try:
        k = round(float(text) * TOKENS) if "." in text else int(text)
    except (ValueError, OverflowError):
        raise DemoError(f"--keep: expected a count such as 128 or a ratio such as 0.22, got {text!r}") from None
    if not 0 < k <= TOKENS:
        of = f"{text} of {TOKENS}" if "." in text else text
        raise DemoError(f"--keep: must keep at least 1 and at most all {TOKENS} tokens, got {of}")
    return k


def parse_methods(text: str) -> list[str]:
    """`all`, or names joined by commas."""
    names = list(METHODS) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise DemoError(f"--method: unknown method {name!r}, choose from all, {', '.join(METHODS)}")
    return names


def _once(select: Callable[[], Tensor], backend: str | None) -> tuple[Tensor, float]:
    """One selection, through the references or (None) through whatever serves the ops, and the time it took."""
    with tp.use_backend(backend) if backend else nullcontext():
        start = time.perf_counter()
        kept = select()[0]
        if kept.is_cuda:
            torch.cuda.synchronize()
        return kept, time.perf_counter() - start


def compare(name: str, x: Inputs, k: int, seed: int, repeats: int) -> Result:
    """Run one method through the ops and through the references; the median of `repeats` times after a warm-up."""

    def select() -> Tensor:
        return METHODS[name].select(x, k, seed)

    kept, _ = _once(select, None)
    by_reference, _ = _once(select, "reference")
    # Taking turns, both meet the same disturbances of a busy machine.
    times = [(_once(select, None)[1], _once(select, "reference")[1]) for _ in range(repeats)]
    seconds, reference_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(kept, by_reference, seconds, reference_seconds)


def share(kept: Tensor, other: Tensor) -> float:
    """How much of one selection is in the other."""
    common: float = torch.isin(kept, other).double().mean().item()
    return common


def explain(name: str, x: Inputs, k: int, seed: int, result: Result) -> str | None:
    """Why two selections differ, or None: the references in float64 tell which tokens are decided by rounding."""
    differing = int((~torch.isin(result.kept, result.by_reference)).sum())
    if differing == 0:
        return None
    with tp.use_backend("reference"):
        exact = METHODS[name].select(Inputs(*(t.double() for t in x)), k, seed)[0]
    ours, theirs = share(result.kept, exact), share(result.by_reference, exact)
    return (
        f"{name}: {differing} of {k} tokens differ, a near-tie decided by float32 rounding; the references in float64 "
        f"agree with {ours:.1%} of ours and {theirs:.1%} of the float32 references'."
    )


def table(results: dict[str, Result], k: int, caption: str) -> Table:
    """One row per method."""
    out = Table(title="Visual tokens kept", caption=caption, caption_justify="left")
    out.add_column("method")
    for heading in ("tokens", "ours", "references", "ratio", "agreement"):
        out.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        out.add_row(
            name,
            f"{TOKENS} -> {k}",
            f"{result.seconds * 1e3:.2f} ms",
            f"{result.reference_seconds * 1e3:.2f} ms",
            f"{result.reference_seconds / result.seconds:.1f}x",
            f"{share(result.kept, result.by_reference):.1%}",
        )
    return out


def _compare_all(names: list[str], x: Inputs, k: int, seed: int, repeats: int, console: Console) -> dict[str, Result]:
    """All methods, with a bar on a terminal and one plain line each elsewhere."""
    if not console.is_terminal:
        results = {}
        for name in names:
            results[name] = compare(name, x, k, seed, repeats)
            console.print(f"{name}: done", highlight=False)
        return results
    columns = (TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        results = {}
        for name in names:
            progress.update(task, description=name)
            results[name] = compare(name, x, k, seed, repeats)
            progress.advance(task)
    return results


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device: this PyTorch finds no CUDA device")
    return torch.device(name)


def without_kernels(device: torch.device) -> str | None:
    """Why the references serve the ops on this device, which leaves nothing to compare; None if kernels do."""
    backends = tp.config()["backends"]
    reasons = [backends[name] for name in (("cuda", "triton") if device.type == "cuda" else ("cpu",))]
    if None in reasons:
        return None
    return f"No kernels for {device.type}, both times are those of the references: {'; '.join(reasons)}"


def _check_out(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise DemoError(f"--out: the panel is a PNG file, give a name that ends in .png, got {path}")
    if not path.resolve().parent.is_dir():
        raise DemoError(f"--out: no such folder: {path.parent}")


def run(options: argparse.Namespace) -> int:
    """The command `demo`; raises DemoError with one line when it cannot do what was asked."""
    k, names, out, device = (
        parse_keep(options.keep),
        parse_methods(options.method),
        Path(options.out),
        _device(options.device),
    )
    if options.repeats < 1:
        raise DemoError(f"--repeats: must be at least 1, got {options.repeats}")
    if not 0 <= options.seed < 2**63:
        raise DemoError(f"--seed: must be at least 0 and below 2**63, got {options.seed}")
    _check_out(out)
    photo = load(options.image)
    pixels = parse_focus(options.focus, photo.size, default_photo=options.image is None)
    square, focus = crop_square(photo, pixels)

    x = inputs(square, focus, device)
    results = _compare_all(names, x, k, options.seed, options.repeats, Console(stderr=True))

    heading = f"{k} of {TOKENS} visual tokens"
    tiles = [panel.Tile("Photo", f"{GRID} x {GRID} patches", None)]
    tiles += [
        panel.Tile(f"{METHODS[name].title}: {result.kept.numel()} kept", METHODS[name].note, result.kept.tolist())
        for name, result in results.items()
    ]
    try:
        panel.draw(square, focus, heading, SUBTITLE, tiles).save(out, format="PNG")
    except OSError as error:
        raise DemoError(f"--out: cannot write {out}: {error.strerror or error}") from None

    console = Console()
    heads, rows, width = x.query.shape[1:]
    threads = torch.get_num_threads()
    runs = "one run" if options.repeats == 1 else f"median of {options.repeats} runs"
    caption = (
        f"{runs} on {device.type}, {threads} thread{'s' if threads > 1 else ''}; "
        f"{heads} heads, {rows} question rows, head dimension {width}; agreement: share of tokens both keep"
    )
    console.print(table(results, k, caption))
    for note in (without_kernels(device), *(explain(name, x, k, options.seed, r) for name, r in results.items())):
        if note:
            console.print(note, highlight=False)
    console.print(f"panel: {out}", highlight=False, soft_wrap=True)
    return 0
