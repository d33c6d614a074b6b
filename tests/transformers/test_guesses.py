"""Assisted decoding: the prompt is pruned before anything is guessed, and what is taken back leaves every layer."""

import copy
from typing import Any

import pytest
import torch

from tests.transformers.vlm.checks import (
    LAYER,
    RENUMBERED,
    assert_decoded_like_the_oracle,
    drops_of,
    generate,
    options_of,
    over_four_and_compact,
)
from tests.transformers.vlm.models import Prompts, llava, text
from tokenprune_kernels.integrations.transformers import prune_visual_tokens

LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": 119}


def repeating() -> Prompts:
    """A prompt whose text has the same words again and again."""
    prompts = llava()
    prompts.inputs["input_ids"][:, -4:] = torch.tensor([7, 8, 7, 8])
    return prompts


def decoder_calls(prompts: Prompts) -> list[int]:
    """The number of tokens in each call of the decoder from now on."""
    lengths: list[int] = []
    prompts.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return lengths


@over_four_and_compact
def test_prompt_lookup_decodes_as_without_it(method: str, compact: bool) -> None:
    prompts = repeating()
    calls = decoder_calls(prompts)
    with prune_visual_tokens(prompts.model, method, 9, compact_cache=compact, **options_of(method)) as pruning:
        want = generate(prompts.model, prompts.inputs, 24)
        kept = pruning.kept
        calls.clear()
        out = generate(prompts.model, prompts.inputs, 24, **LOOKUP)
    longest = want.sequences.shape[1]  # some versions of transformers take a right guess more than they were asked for
    assert torch.equal(out.sequences[:, :longest], want.sequences)
    assert torch.equal(pruning.kept, kept)
    assert calls[0] == prompts.inputs["input_ids"].shape[1]  # no guess behind the prompt
    assert len(calls) < 20  # some guesses are right
    drops = drops_of(prompts, pruning, LAYER, compact)
    assert_decoded_like_the_oracle(prompts, drops, out, renumber=method in RENUMBERED)


@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
def test_an_assistant_model_guesses_and_is_corrected(compact: bool) -> None:
    """The assistant is the model without pruning, which transformers shows no image: its guesses are taken back."""
    prompts = llava()
    assistant = copy.deepcopy(prompts.model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 4
    calls = decoder_calls(prompts)
    length = prompts.inputs["input_ids"].shape[1]
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER, compact_cache=compact) as pruning:
        want = generate(prompts.model, prompts.inputs, 10)
        calls.clear()
        out = generate(prompts.model, prompts.inputs, 10, assistant_model=assistant)
        assert pruning.stats["prefills"] == 2
        assert out.past_key_values.get_seq_length() == length + 9
    assert torch.equal(out.sequences, want.sequences)
    assert calls[0] == length  # no guess behind the prompt
    assert max(calls[1:]) == 5
    assert_decoded_like_the_oracle(prompts, drops_of(prompts, pruning, LAYER, compact), out)


def test_text_alone_is_guessed_from_the_start() -> None:
    prompts = llava()
    ids = torch.tensor([[*text(4, torch.Generator().manual_seed(1)), 7, 8, 7, 8, 7]])
    lengths = decoder_calls(prompts)
    plain = generate(prompts.model, {"input_ids": ids}, 5, **LOOKUP)
    outside = list(lengths)
    lengths.clear()
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER):
        inside = generate(prompts.model, {"input_ids": ids}, 5, **LOOKUP)
    assert lengths == outside
    assert lengths[0] > ids.shape[1]
    assert torch.equal(inside.sequences, plain.sequences)


def test_guesses_of_the_model_itself_are_refused_by_name() -> None:
    prompts = llava()

    def guessing(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found.requires_model_outputs = True
        return found

    original = prompts.model._get_candidate_generator
    with prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER) as pruning:
        with pytest.raises(NotImplementedError, match="assistant_early_exit=2 guesses with the pruned model itself"):
            generate(prompts.model, prompts.inputs, 5, assistant_early_exit=2)
        assert pruning.kept is None
    prompts.model._get_candidate_generator = guessing  # as multi-token prediction does
    with (
        prune_visual_tokens(prompts.model, "coast", 9, layer=LAYER),
        pytest.raises(NotImplementedError, match="PromptLookupCandidateGenerator guesses by what the model returned"),
    ):
        generate(prompts.model, prompts.inputs, 5, **LOOKUP)
