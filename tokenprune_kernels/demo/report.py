"""What the terminal shows: progress while the rows run, then the table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .answers import COMPACTION, SELECTION, VISION, Row


@contextmanager
def progress(total: int, console: Console) -> Iterator[Callable[[Row, bool], None]]:
    """A bar on a terminal, one plain line per row elsewhere; yields what is called after each step of a row."""
    if not console.is_terminal:

        def line(row: Row, answered: bool) -> None:
            if answered:
                console.print(f"{row.name}: answered", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("asking", total=total)

        def advance(row: Row, answered: bool) -> None:
            bar.update(task, advance=1, description=f"{'asked' if answered else 'timed'}: {row.name}")

        yield advance


def caption(rows: Sequence[Row], repeats: int, device: torch.device, dtype: torch.dtype, correct: str | None) -> str:
    """How the times were taken; the correct answer, where it is known."""
    threads = torch.get_num_threads()
    runs = "one run" if repeats == 1 else f"median of {repeats} interleaved runs"
    backends = {row.pruning.stats["backend"] for row in rows if row.pruning is not None} - {None}
    served = f", ops: {', '.join(sorted(backends))}" if backends else ""
    lines = [
        f"prefill: one forward, vision tower included; {runs} on {device.type}, {threads} "
        f"thread{'s' if threads > 1 else ''}, {str(dtype).removeprefix('torch.')}{served}",
        "selecting: share of the prefill that selection and compaction took",
    ]
    return "\n".join(([f"correct: {correct}"] if correct else []) + lines)


def table(question: str, rows: Sequence[Row], note: str) -> Table:
    """One line per row; the first is the one without pruning. Answers are shown as they are, never as markup."""
    out = Table(title=Text(question), caption=Text(note), caption_justify="left")
    out.add_column("method", no_wrap=True)
    out.add_column("tokens", justify="right", no_wrap=True)
    out.add_column("answer", overflow="fold")
    out.add_column("same")
    for heading in ("prefill", "speed-up", "selecting"):
        out.add_column(heading, justify="right", no_wrap=True)
    full = rows[0]
    for row in rows:
        same = faster = share = ""
        if row is full:
            tokens = str(row.before)
        else:
            tokens = f"{row.before} -> {row.after}"
            same = "yes" if row.answer == full.answer else "no"
            faster, share = f"{full.median() / row.median():.2f}x", f"{row.share():.1%}"
        answer = row.answer or "(nothing)"
        cells = (row.name, tokens, answer, same, f"{row.median() * 1e3:.1f} ms", faster, share)
        out.add_row(*map(Text, cells))
    return out


def times(rows: Sequence[Row]) -> Table:
    """Where the time went, a line per row, in milliseconds."""
    note = (
        f"ms, of the same prefills; {VISION}: all in front of the decoder, projector included; prefill: the language "
        "model's; decode: a further token of the answer, one run"
    )
    out = Table(title="where the time went", caption=Text(note), caption_justify="left")
    out.add_column("method", no_wrap=True)
    for heading in (VISION, SELECTION, COMPACTION, "prefill", "decode"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        pruned = [f"{row.part(name) * 1e3:.2f}" if row.pruning is not None else "" for name in (SELECTION, COMPACTION)]
        step = row.step()
        decode = "" if step is None else f"{step * 1e3:.2f}"
        cells = (row.name, f"{row.part(VISION) * 1e3:.2f}", *pruned, f"{row.language() * 1e3:.2f}", decode)
        out.add_row(*map(Text, cells))
    return out
