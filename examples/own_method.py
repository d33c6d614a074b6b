"""A pruning method of your own: a function inside a model, as it is or by a name.

    python examples/own_method.py

The model is the small one of this repository, which is asked about the example image that lies beside it.
"""

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune_kernels.demo import example
from tokenprune_kernels.integrations.transformers import prune_visual_tokens
from tokenprune_kernels.methods import register_method


def outliers(features: Tensor, present: Tensor, k: int, *, nearest: bool = False) -> Tensor:
    """[B, k]: the tokens least like the mean one, or with `nearest` the most. Parameters name what they are given."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1) * present.unsqueeze(-1)
    likeness = (unit * unit.sum(1, keepdim=True)).sum(-1)
    score = likeness if nearest else -likeness
    return score.masked_fill(~present, -torch.inf).topk(k).indices


def main() -> None:
    folder = example.model_folder(None)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image, question = {"type": "image", "path": str(example.image_path(folder))}, example.QUESTION
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, {"type": "text", "text": question}]}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip

    def ask(method: object, **options: object) -> None:
        with torch.inference_mode(), prune_visual_tokens(model, method, keep=128, **options) as pruning:
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{pruning.method}: {pruning.stats['after'][0]} of {pruning.stats['before'][0]} tokens: {answer}")

    print(question, "Correct is", example.ANSWER)
    ask(outliers)
    ask(outliers, nearest=True)  # an option of its own
    ask(outliers, layer=2)  # by the hidden states in front of layer 2
    register_method("unlike_the_mean", outliers)
    ask("unlike_the_mean")


if __name__ == "__main__":
    main()
