"""The vocabulary: every word of the questions and answers is a token, and so is every number up to 18."""

from functools import cache

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .scene import COLOURS, KINDS
from .sources import TEXTURES

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *map(str, range(19)), "coin", "coins", "face", "faces", "s", *COLOURS, *TEXTURES, "photo", "digit", "tiny", "large",
    "yes", "no", "nothing", "is", "there", "a", "how", "many", "are", "which", "what", "on", "in", "the", "top",
    "bottom", "left", "right", "corner", "of", "above", "below", "colour", "larger", "or", "plus", ",", "?",
)  # fmt: skip
VOCABULARY = (*SPECIAL, *WORDS)
PAD, BOS, EOS, UNKNOWN, IMAGE = range(len(SPECIAL))
assert set(KINDS) <= set(WORDS)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, numbers and punctuation; "3s" is "3" and "s", case does not matter, and a prompt begins with <s>."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|[a-z]+|[^\w\s]"), "removed", invert=True)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip


@cache
def encode(text: str) -> tuple[int, ...]:
    """The tokens of a question or an answer, without <s>; a word the vocabulary lacks is an error."""
    tokens = tuple(tokenizer().encode(text, add_special_tokens=False))
    if UNKNOWN in tokens:
        raise ValueError(f"not in the vocabulary: {text!r}")
    return tokens
