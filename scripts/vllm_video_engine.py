"""A small random Qwen-VL in vLLM's offline engine on the CPU, with videos pruned by the engine's functions and by ours.

`python -m scripts.vllm_video_engine`, where vLLM is installed. In float32 both give the same prompts, answers and
log-probabilities; as many other tokens, the control, give others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

RUNS = [("qwen2_5_vl", "evs"), ("qwen3_vl", "evs"), ("qwen3_vl", "vidcom2")]
RATE = 0.6
PATCH, MERGE, TIMES = 14, 2, 2
SAME, OTHER = 1e-4, 1e-2  # log-probabilities that are equal, and that are not
QUESTIONS = ("w40 w41 w42", "w50 w51", "w60 w61 w62 w63")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def tokenizer() -> Any:
    """One token per word; what stands for no word spells the time stamps of Qwen3-VL."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stamps = ["<", ">", ".", "seconds", *map(str, range(10))]
    names = dict(enumerate([*WORDS, *stamps]))
    words = Tokenizer(models.WordLevel({names.get(n, f"w{n}"): n for n in range(72)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]\w*|\d|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=WORDS[4:],
    )  # fmt: skip


def write(family: str, folder: Path) -> None:
    """A checkpoint with initial weights so wide that what it answers depends on what it sees."""
    import transformers as tf

    wide = {"initializer_range": 0.2}
    ids = {f"{name}_token_id": WORDS.index(f"<|{word}|>") for name, word in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"),
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 72, "max_position_embeddings": 2048, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope, **wide,
    }  # fmt: skip
    vision = {
        "depth": 3, "num_heads": 2, "in_channels": 3, "patch_size": PATCH, "spatial_merge_size": MERGE,
        "temporal_patch_size": TIMES, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64, **wide,
    }  # fmt: skip
    if family == "qwen2_5_vl":
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [0, 2], "tokens_per_second": 2}
        kind, config = tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig
        videos = "Qwen2VLVideoProcessor"
    else:
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 32, "rope_parameters": {**rope, "mrope_interleaved": True}}
        kind, config = tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig
        videos = "Qwen3VLVideoProcessor"
    torch.manual_seed(0)
    kind(config(text_config=text, vision_config=vision, **ids)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    common = {
        "patch_size": PATCH, "temporal_patch_size": TIMES, "merge_size": MERGE,
        "size": {"shortest_edge": PATCH * PATCH * 4, "longest_edge": PATCH * PATCH * 4096},
    }  # fmt: skip
    images = {**common, "image_processor_type": "Qwen2VLImageProcessor"}
    frames = {**common, "video_processor_type": videos, "do_sample_frames": False}
    name = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family]
    parts = {"processor_class": name, "image_processor": images, "video_processor": frames}
    for file, content in (
        ("processor_config", parts), ("preprocessor_config", images), ("video_preprocessor_config", frames)
    ):  # fmt: skip
        (folder / f"{file}.json").write_text(json.dumps(content))


def requests(family: str) -> list[dict[str, Any]]:
    """Videos of several lengths and sizes, in which a square moves over a background that slowly changes.

    Frames of Qwen3-VL come with their own start and end. The engine looks for the first start in the prompt, and takes
    it for that of the first frame, so that there must not be another one around the video.
    """
    place = "<|video_pad|>" if family == "qwen3_vl" else "<|vision_start|><|video_pad|><|vision_end|>"
    asked = []
    for n, (question, frames, side) in enumerate(zip(QUESTIONS, (6, 10, 16), (84, 112, 56), strict=True)):
        draw = torch.Generator().manual_seed(n)
        scene = 255 * torch.rand(1, side, side, 3, generator=draw)
        video = scene + (10 * torch.randn(frames, side, side, 3, generator=draw)).cumsum(0)
        for t in range(frames):
            video[t, 3 * t : 3 * t + 20, 2 * t : 2 * t + 20] = 255 * torch.rand(3, generator=draw)
        metadata = {
            "fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip
        pixels = video.clamp(0, 255).to(torch.uint8).numpy()
        asked.append({"prompt": f"w30 w31 {place} {question}", "multi_modal_data": {"video": [(pixels, metadata)]}})
    return asked


def last(count: Any) -> Any:
    """As many tokens as the engine keeps, but those at the end."""

    def compute_retention_mask(video_embeds: Any, video_size_thw: Any, **others: Any) -> Any:
        tokens, frames = len(video_embeds), int(video_size_thw[0])
        kept = count(tokens_per_frame=tokens // frames, num_frames=frames, q=others["q"])
        return torch.arange(tokens) >= tokens - kept

    return compute_retention_mask


def answers(family: str, method: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By whose masks: of every request the length of its prompt, the answer, and log-probabilities of its tokens."""
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from tokenprune_kernels.integrations.vllm import video
    from tokenprune_kernels.integrations.vllm.runner import complete

    complete(CPUModelRunner)  # for the engine's own pruning of videos too
    llm = LLM(
        str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=4, seed=0,
        limit_mm_per_prompt={"video": 1, "image": 0}, video_pruning_rate=RATE, video_pruning_method=method,
        gpu_memory_utilization=0.2, distributed_executor_backend="uni", disable_log_stats=True,
        enable_prefix_caching=False, mm_processor_cache_gb=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5)
    ours, found = video.SERVED_BY, {}
    # Ours come behind the control: what is left in a cache would be seen.
    for name, served_by in (("engine", None), ("control", dict.fromkeys(ours, last)), ("ours", ours)):
        if served_by is not None:
            video.SERVED_BY = served_by
            video.register_video()
        llm.llm_engine.reset_encoder_cache()
        found[name] = [
            {
                "length": len(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids),
                "logprobs": [{str(t): each.logprob for t, each in step.items()} for step in out.outputs[0].logprobs],
            }
            for out in llm.generate(requests(family), sampling, use_tqdm=False)
        ]  # fmt: skip
        video.unregister_video()
    return found


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of log-probabilities, up to the first token in which the answers differ."""
    most = 0.0
    for i, (x, y) in enumerate(zip(a["logprobs"], b["logprobs"], strict=True)):
        most = max([most, *(abs(x[t] - y[t]) for t in x.keys() & y.keys())])
        if a["tokens"][i] != b["tokens"][i]:
            break
    return most


def check(folder: Path) -> bool:
    """Prints the table of answers; whether ours are the engine's answers, and the control's are not."""
    print("\n| model | method | tokens of the prompts | answers | log-probabilities apart | of the control |")
    print("|---|---|---|---|---|---|")
    good = True
    for family, method in RUNS:
        target = folder / family
        if not target.exists():
            write(family, target)
        command = [sys.executable, "-m", "scripts.vllm_video_engine", "--run", family, method, str(target)]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **IN_PROCESS})
        if ran.returncode:
            print(ran.stdout[-2000:], ran.stderr[-6000:], sep="\n")
            return False
        found = json.loads(ran.stdout.splitlines()[-1])
        engine, ours, control = found["engine"], found["ours"], found["control"]
        lengths = [[a["length"] for a in answered] for answered in (engine, ours)]
        alike = sum(a["tokens"] == b["tokens"] for a, b in zip(engine, ours, strict=True))
        ours_apart = max(apart(a, b) for a, b in zip(engine, ours, strict=True))
        other_apart = min(apart(a, b) for a, b in zip(engine, control, strict=True))
        good &= lengths[0] == lengths[1] and alike == len(engine) and ours_apart < SAME and other_apart > OTHER
        of = ", ".join(f"{a} = {b}" if a == b else f"{a}, not {b}" for a, b in zip(*lengths, strict=True))
        print(f"| {family} | {method} | {of} | {alike} of {len(engine)} equal | {ours_apart:.1g} | {other_apart:.1g} |")
    return good


# Without processes of its own and without talking to anyone, the engine can be looked into.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=3, metavar=("FAMILY", "METHOD", "FOLDER"), help="one engine")
    run = parser.parse_args().run
    if run:
        print(json.dumps(answers(run[0], run[1], Path(run[2]))))
        return 0
    with tempfile.TemporaryDirectory(prefix="tokenprune-vllm-video-") as folder:
        return 0 if check(Path(folder)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
