"""The model's forward pass over packed questions, and the losses of training.

Modules are the transformers model's own; only the order of calls is ours: windows of the image use their part of the
position embeddings, and attention knows where the questions begin.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .batches import GROUND, INK, NONE, SHOWN, Batch, mask
from .scene import KINDS
from .words import BOS, encode

SHARPNESS = 16.0  # of the cosine between a visual token and the words for it
IMAGE_WEIGHT = 0.25  # of tokens without an object in the loss of what they show


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of the image, then masked attention of the questions: half the work of one masked call."""
    seen = query.shape[2] - attention_mask.shape[2]
    image = F.scaled_dot_product_attention(
        query[:, :, :seen], key[:, :, :seen], value[:, :, :seen], is_causal=True, scale=scaling
    )
    text = F.scaled_dot_product_attention(query[:, :, seen:], key, value, attn_mask=attention_mask, scale=scaling)
    return torch.cat([image, text], 2).transpose(1, 2), None


AttentionInterface.register("packed_questions", packed_attention)


class Losses(NamedTuple):
    """Mean losses, and (no loss) the share of the objects' tokens that are nearest to the right word.

    `ground` and `look` count as much as the stage says.
    """

    answer: Tensor
    shown: Tensor
    ink: Tensor
    image: Tensor
    named: Tensor
    ground: Tensor
    look: Tensor

    def total(self, ground: float = 0.0, look: float = 0.0) -> Tensor:
        usual = self.answer + self.shown + 0.5 * self.ink + 0.25 * self.image
        return usual + ground * self.ground + look * self.look


def embed(model: LlavaForConditionalGeneration, pixels: Tensor, window: Tensor) -> Tensor:
    """[B, 1 + N, C]: the projected class token and visual tokens of a window of the image."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    position = tower.embeddings.position_embedding
    patches = patches + position(1 + window)
    first = tower.embeddings.class_embedding + position.weight[0]
    hidden = tower.pre_layrnorm(torch.cat([first.expand(len(pixels), 1, -1), patches], 1))
    for layer in tower.encoder.layers:
        hidden = layer(hidden, None)
    return model.model.multi_modal_projector(hidden)


def answer(model: LlavaForConditionalGeneration, visual: Tensor, batch: Batch, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, vocabulary]: the logits behind every text token; and the loss of where answers look."""
    decoder = model.model.language_model
    first = decoder.embed_tokens.weight[BOS].expand(len(visual), 1, -1)
    hidden = torch.cat([first, visual, decoder.embed_tokens(batch.text)], 1)
    positions = torch.cat([torch.zeros_like(batch.window[:, :1]), 1 + batch.window, batch.positions], 1)
    rotary = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers:
        before = hidden
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary, position_ids=positions)
    logits = model.lm_head(decoder.norm(hidden[:, -batch.text.shape[1] :]))
    return logits, looking(decoder.layers[-1], before, rotary, batch)


def looking(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
    """In the last layer the token before an answer attends to the cells where the answer is to be seen.

    Of its attention to the image, averaged over heads, the part that falls there: minus its logarithm. Without this
    the questions about relations stay at guessing for longer than a CPU has time.
    """
    attention, length = layer.self_attn, batch.text.shape[1]
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query = attention.q_proj(normed).view(shape).transpose(1, 2)
    key = attention.k_proj(normed).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    query, key = query[:, :, -length:], key[:, :, 1 : 1 + batch.window.shape[1]]
    asked = batch.look.any(-1)
    part = [
        ((query[b][:, asked[b]] @ key[b].mT * attention.scaling).softmax(-1) * batch.look[b, asked[b]]).sum(-1).mean(0)
        for b in range(len(hidden))
    ]
    return -torch.cat(part).clamp_min(1e-6).log().mean()


def _similar(tokens: Tensor, words: Tensor) -> Tensor:
    return SHARPNESS * F.normalize(tokens, dim=-1) @ F.normalize(words, dim=-1).T


def alignment(
    model: LlavaForConditionalGeneration, visual: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Projected visual tokens are drawn to the words for what they show, as CLIP's are to captions.

    Returns the loss of what is shown, of ink and size, and of the class token, which names all that is in the image;
    and `named` and `ground` of Losses.
    """
    table = model.model.language_model.embed_tokens.weight

    def words(*names: str) -> Tensor:
        return table[[encode(name)[0] for name in names]]

    token, whole = visual[:, 1:].flatten(0, 1), visual[:, 0]
    weight = torch.ones(len(SHOWN))
    weight[len(KINDS) :] = IMAGE_WEIGHT
    likeness, target = _similar(token, words(*SHOWN)), batch.shown.flatten()
    shown = F.cross_entropy(likeness, target, weight)
    objects = target < len(KINDS)
    named = (likeness.argmax(-1) == target)[objects].float().mean()
    on_digits = batch.ink.flatten() != NONE
    if on_digits.any():
        drawn = token[on_digits]
        ink = F.cross_entropy(_similar(drawn, words(*INK)), batch.ink.flatten()[on_digits])
        ink = ink + F.cross_entropy(_similar(drawn, words("large", "tiny")), batch.tiny.flatten()[on_digits])
    else:
        ink = token.sum() * 0
    lying = batch.ground.flatten() != NONE
    ground = F.cross_entropy(_similar(token[lying], words(*GROUND)), batch.ground.flatten()[lying])
    there = F.one_hot(batch.shown, len(SHOWN)).amax(1)[:, :-1].float()
    there = there / there.sum(1, keepdim=True).clamp_min(1)
    image = -(there * _similar(whole, words(*SHOWN[:-1])).log_softmax(-1)).sum(1).mean()
    return shown, ink, image, named, ground


def losses(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Losses, Tensor]:
    """The losses of a batch, and [B, T] which answers were right."""
    visual = embed(model, batch.pixels, batch.window)
    shown, ink, image, named, ground = alignment(model, visual, batch)
    none = shown.new_zeros(())
    if not batch.text.shape[1]:
        return Losses(none, shown, ink, image, named, ground, none), batch.text == 1
    logits, look = answer(model, visual[:, 1:], batch, mask(batch))
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=NONE)
    return Losses(loss, shown, ink, image, named, ground, look), logits.argmax(-1) == batch.targets
