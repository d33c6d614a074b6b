"""The engine in this process, with one setting on one family: prints what it answers beside transformers, as JSON."""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def engine(folder: Path, *, chunk: int, **others: Any) -> Any:
    """chunk: tokens of a step of prefill; images are longer."""
    from vllm import LLM

    return LLM(
        str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=8,
        limit_mm_per_prompt={"image": 2}, enable_prefix_caching=True, enable_chunked_prefill=True,
        max_num_batched_tokens=chunk, gpu_memory_utilization=0.2, distributed_executor_backend="uni", seed=0,
        disable_log_stats=True, **others,
    )  # fmt: skip


def compare(family: str, folder: Path, text: str, chunk: int) -> list[dict[str, Any]]:
    """A row for each prompt: lengths, answers, differences; and for one of them, how far other tokens are away."""
    from vllm import SamplingParams

    from tokenprune_kernels.integrations.vllm import Setting, parse

    from .answers import TOKENS, WORDS, Transformers, difference, of_engine
    from .models import written
    from .prompts import prompts

    target = written(family, folder)
    # Two images with all tokens are too long for the small model; for a second, transformers goes on drawing.
    one_only = not text or "random" in text
    asked = [p for p in prompts() if len(p.images) < 2 or not one_only]
    llm = engine(target / "engine", chunk=chunk)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=5, allowed_token_ids=WORDS)
    outputs = llm.generate([p.request(family) for p in asked], sampling, use_tqdm=False)
    outputs += llm.generate([asked[0].request(family)], sampling, use_tqdm=False)
    asked.append(asked[0])
    setting = parse(text) if text else Setting("random", 1.0)
    others = Setting("random", setting.keep, seed=9)
    there = Transformers(family, target / "transformers")
    rows = []
    for prompt, output in zip(asked, outputs, strict=True):
        answer = of_engine(output)
        length, logits = there.logits(prompt, setting, answer.tokens)
        other = difference(answer, there.logits(prompt, others, answer.tokens)[1]) if prompt.images and text else None
        rows.append({
            "family": family, "setting": text, "images": len(prompt.images), "length": answer.length,
            "expected": length, "same": [WORDS[best] for best in logits[:, WORDS].argmax(-1)] == answer.tokens,
            "difference": difference(answer, logits), "others": other, "cached": output.num_cached_tokens,
            "answer": llm.get_tokenizer().decode(answer.tokens[:1]),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", default="")
    parser.add_argument("--chunk", type=int, default=96)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("TOKENPRUNE_VLLM", None)
    if arguments.setting:
        os.environ["TOKENPRUNE_VLLM"] = arguments.setting
    print(json.dumps(compare(arguments.family, arguments.folder, arguments.setting, arguments.chunk)))


if __name__ == "__main__":
    main()
