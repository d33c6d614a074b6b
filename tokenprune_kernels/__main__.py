"""The command line: `python -m tokenprune_kernels info`, `... demo` and `... bench --quick`."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from ._command import DEVICES, CommandError

# In this order: transformers does not say plainly that one of the others is missing.
EXTRAS = {"numpy": "numpy", "PIL": "pillow", "rich": "rich", "transformers": "transformers"}


class _Parser(argparse.ArgumentParser):
    """argparse with one line per error instead of the usage and the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _info(options: argparse.Namespace) -> int:
    from . import config, show_config

    if options.json:
        print(json.dumps(config(), indent=2))
    else:
        show_config()
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        for module in EXTRAS:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise CommandError(f"{package} is not installed, run: pip install 'tokenprune_kernels[demo]'") from None
    from .demo.run import run

    return run(options)


def _bench(options: argparse.Namespace) -> int:
    from .quick.run import run

    return run(options)


def _parser() -> argparse.ArgumentParser:
    from . import __version__
    from .methods import method_names

    parser = _Parser(prog="tokenprune", description="Visual-token pruning kernels.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tokenprune_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo,bench}")

    info = commands.add_parser("info", help="versions, hardware, which backends loaded, and which one serves each op")
    info.add_argument("--json", action="store_true", help="one JSON object, to attach to a report")
    info.set_defaults(run=_info, parser=info)

    demo = commands.add_parser(
        "demo",
        help="ask a vision-language model about an image with all visual tokens and with few, by every method",
        description="Load a small vision-language model, ask it a question about an image with all visual tokens and "
        "with those that each method keeps, print the answers and times, and draw what was kept.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--model",
        metavar="FOLDER",
        help="a checkpoint of transformers on this disk, of a family in docs/transformers.md: its folder, or its id "
        "owner/name when it is in the local cache of the Hugging Face hub "
        "(default: studies/models/tiny-llava-vqa of the checkout)",
    )
    demo.add_argument("--image", metavar="FILE", help="any image Pillow reads (default: the example of the model)")
    demo.add_argument("--question", metavar="TEXT", help="what to ask about it (default: the example's question)")
    demo.add_argument(
        "--method",
        default="all",
        metavar="NAME",
        help=f"all, or some of {', '.join(method_names())}, joined by commas (default: all)",
    )
    demo.add_argument(
        "--keep",
        default="0.222",
        metavar="K",
        help="visual tokens that stay: a count (128) or a ratio of the prompt's (0.222) (default: 0.222)",
    )
    demo.add_argument("--out", default="demo.png", metavar="FILE.png", help="the panel (default: demo.png)")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="for the random baseline (default: 0)")
    demo.add_argument("--repeats", type=int, default=5, metavar="R", help="timed rounds, after a warm-up (default: 5)")
    demo.add_argument(
        "--device", choices=DEVICES, default="auto", help="where the model runs (default: auto, a GPU if there is one)"
    )
    demo.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="the longest answer, in tokens (default: 32)"
    )
    demo.set_defaults(run=_demo, parser=demo)

    bench = commands.add_parser(
        "bench",
        help="with --quick: what five kernels are worth on this machine, in under a minute",
        description="Time five steps of pruning at the sizes of LLaVA-1.5-7B, ours and what they replace, after their "
        "results were compared, and print how many times faster ours are.",
        allow_abbrev=False,
    )
    bench.add_argument("--quick", action="store_true", help="needed: the whole benchmark is `make bench` in a checkout")
    bench.add_argument(
        "--device", choices=DEVICES, default="auto", help="where they run (default: auto, a GPU if there is one)"
    )
    bench.add_argument("--out", metavar="FILE.png", help="draw the bars too; needs matplotlib")
    bench.set_defaults(run=_bench, parser=bench)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a wrong use exits with status 2 and one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except CommandError as error:
        options.parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
