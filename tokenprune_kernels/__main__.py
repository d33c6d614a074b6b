"""The command line: `python -m tokenprune_kernels info` and `... demo`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

EXTRAS = {"skimage": "scikit-image", "PIL": "pillow", "rich": "rich", "numpy": "numpy"}


class _Parser(argparse.ArgumentParser):
    """argparse with one line per error instead of the usage and the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _info(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from . import show_config

    show_config()
    return 0


def _demo(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        from .demo.photo import DemoError
        from .demo.run import run
    except ModuleNotFoundError as error:
        package = EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        parser.error(f"{package} is not installed, run: pip install 'tokenprune_kernels[demo]'")
    try:
        return run(options)
    except DemoError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tokenprune", description="Visual-token pruning kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")

    info = commands.add_parser("info", help="versions, architectures and which backends loaded")
    info.set_defaults(run=_info, parser=info)

    demo = commands.add_parser(
        "demo",
        help="prune a photograph with every method, draw what each keeps and time it",
        description="Cut a photograph into 24 x 24 patches, let each method keep some of them, draw the result, and "
        "compare the time through the ops with the time through the PyTorch references.",
        allow_abbrev=False,
    )
    demo.add_argument("--image", metavar="FILE", help="any picture Pillow reads (default: one from scikit-image)")
    demo.add_argument(
        "--method",
        default="all",
        metavar="NAME",
        help="all, or some of coast, sts, adafv, zspaprune, adaptprune, fastv, divprune, random, joined by commas "
        "(default: all)",
    )
    demo.add_argument("--keep", default="128", metavar="K", help="a count (128) or a ratio (0.22) (default: 128)")
    demo.add_argument(
        "--focus",
        metavar="X,Y",
        help="where the question points to: fractions of width and height (0.6,0.7) or pixels (360,120) of the photo "
        "(default: its centre; the eye in the default photo)",
    )
    demo.add_argument("--out", default="demo.png", metavar="FILE.png", help="the panel (default: demo.png)")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="for the random baseline (default: 0)")
    demo.add_argument("--repeats", type=int, default=7, metavar="R", help="timed runs, after a warm-up (default: 7)")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the ops run (default: cpu)")
    demo.set_defaults(run=_demo, parser=demo)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a wrong use exits with status 2 and one line on stderr."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options.parser, options)
    return status


if __name__ == "__main__":
    sys.exit(main())
