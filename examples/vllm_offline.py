"""A LLaVA in the vLLM engine with 128 of 576 visual tokens. The environment says so; the program is as without it.

`vllm serve MODEL` reads the same variable. MODEL and ENGINE, more arguments as JSON, are what the check runs it with.
"""

import json
import os

from PIL import Image
from vllm import LLM, SamplingParams

os.environ.setdefault("TOKENPRUNE_VLLM", "method=divprune,keep=128")

if __name__ == "__main__":
    llm = LLM(os.environ.get("MODEL", "llava-hf/llava-1.5-7b-hf"), **json.loads(os.environ.get("ENGINE", "{}")))
    picture = Image.open("studies/models/tiny-llava-vqa/example.png").convert("RGB")
    request = {"prompt": "<image> is there a 5?", "multi_modal_data": {"image": picture}}
    (reply,) = llm.generate(request, SamplingParams(temperature=0, max_tokens=1))
    print(f"{len(reply.prompt_token_ids)} tokens in the prompt, answer: {reply.outputs[0].text.strip()}")
