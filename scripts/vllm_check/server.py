"""The engine's HTTP servers on the loopback address, with and without pruning, and requests to both."""

import argparse
import base64
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .answers import TOKENS
from .models import written
from .prompts import QUESTIONS, pictures

HOST = "127.0.0.1"
CONCURRENT = (1, 2, 8)
READY_S = 600


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        return int(listening.getsockname()[1])


def get(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read() or b"null")


@contextmanager
def serving(folder: Path, setting: str, log: Path) -> Iterator[int]:
    """The port of a server that is ready."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "TOKENPRUNE_VLLM"}
    if setting:
        environment["TOKENPRUNE_VLLM"] = setting
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "tiny",
        "--host", HOST, "--port", str(port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
        "--max-num-seqs", "8", "--gpu-memory-utilization", "0.2", "--no-enable-prefix-caching", "--max-logprobs", "5",
    ]  # fmt: skip
    with log.open("w") as told, subprocess.Popen(command, env=environment, stdout=told, stderr=told) as process:
        try:
            began = time.monotonic()
            while True:
                try:
                    get(port, "/health")
                    break
                except (urllib.error.URLError, ConnectionError):
                    if process.poll() is not None or time.monotonic() - began > READY_S:
                        raise RuntimeError(f"the server is not ready:\n{log.read_text()[-3000:]}") from None
                    time.sleep(1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def body_of(image: Any, question: str) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS,
        "ignore_eos": True, "logprobs": True, "top_logprobs": 5, "add_special_tokens": True,
    }  # fmt: skip


def ask(port: int, bodies: list[dict[str, Any]], at_once: int) -> tuple[list[Any], float]:
    """The replies, and seconds."""
    with ThreadPoolExecutor(at_once) as pool:
        began = time.perf_counter()
        replies = list(pool.map(lambda body: get(port, "/v1/chat/completions", body), bodies))
        return replies, time.perf_counter() - began


def told(reply: Any) -> tuple[int, list[str], list[dict[str, float]]]:
    """Tokens of the prompt, words of the answer, log-probabilities by word."""
    steps = reply["choices"][0]["logprobs"]["content"]
    logprobs = [{each["token"]: each["logprob"] for each in step["top_logprobs"]} for step in steps]
    return reply["usage"]["prompt_tokens"], [step["token"] for step in steps], logprobs


def measure(folder: Path, setting: str, requests: int, rounds: int) -> dict[str, Any]:
    """Differences to transformers of what 8 requests at once are answered, and how much faster pruned requests are.

    Both servers run and take turns: one is asked `requests` times, then the other, so that both see the same machine.
    Every picture is another one, so that nothing is answered from a cache.
    """
    from tokenprune_kernels.integrations.vllm import parse

    from .answers import Answer, Transformers, difference
    from .prompts import Prompt

    target = written("LLaVA-1.5", folder)
    with ExitStack() as stack:
        ports = {
            kind: stack.enter_context(serving(target / "engine", text, folder / f"server-{kind}.log"))
            for kind, text in (("full", ""), ("pruned", setting))
        }
        images = iter(pictures(requests * rounds * len(CONCURRENT) + requests))

        def bodies() -> list[tuple[Any, str]]:
            return [(next(images), QUESTIONS[n % len(QUESTIONS)]) for n in range(requests)]

        first = bodies()
        answered = {kind: ask(port, [body_of(*each) for each in first], 8)[0] for kind, port in ports.items()}
        seconds: dict[int, list[tuple[float, float]]] = {}
        for at_once in CONCURRENT:
            for _ in range(rounds):
                batch = [body_of(*each) for each in bodies()]
                seconds.setdefault(at_once, []).append(
                    (ask(ports["full"], batch, at_once)[1], ask(ports["pruned"], batch, at_once)[1])
                )
    there = Transformers("LLaVA-1.5", target / "transformers")
    words = there.processor.tokenizer.convert_tokens_to_ids
    rows = []
    for kind, text in (("full", "method=random,keep=1.0"), ("pruned", setting)):
        worst, lengths, same = 0.0, set(), True
        for (image, question), reply in zip(first, answered[kind], strict=True):
            length, tokens, logprobs = told(reply)
            numbers = [{words(w): value for w, value in step.items()} for step in logprobs]
            answer = Answer(length, words(tokens), numbers)
            expected, logits = there.logits(Prompt(question, (image,)), parse(text), answer.tokens)
            worst = max(worst, difference(answer, logits))
            same &= logits.argmax(-1).tolist() == answer.tokens and length == expected
            lengths.add(length)
        rows.append({"kind": kind, "difference": worst, "same": same, "lengths": sorted(lengths)})
    return {
        "rows": rows,
        "setting": setting,
        "requests": requests,
        "throughput": {
            str(n): [full / pruned for full, pruned in each] for n, each in seconds.items()
        },
        "per_second": {
            str(n): [statistics.median(requests / pair[i] for pair in each) for i in (0, 1)]
            for n, each in seconds.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", default="method=divprune,keep=128")
    parser.add_argument("--requests", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of both servers")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.folder, arguments.setting, arguments.requests, arguments.rounds)))


if __name__ == "__main__":
    main()
