"""What the integration knows of a family of models: one frozen `Family` each, in adapters/, listed in registry.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function

from .layout import Layout

Model = Any  # a module whose attributes depend on the family
Inputs = dict[str, Any]  # the keyword arguments of the multimodal model's forward

# Of decoders with windows in some layers or in all: `Family.layer_types` and `Family.cache_layers`.
WINDOWS = frozenset({"full_attention", "sliding_attention"})
WINDOW_LAYERS: tuple[type, ...] = (DynamicLayer, DynamicSlidingWindowLayer)
# Layers that reuse keys and values of others have none of their own.
SHARING_LAYERS: tuple[type, ...] = (*WINDOW_LAYERS, getattr(cache_utils, "DummyLayer", DynamicLayer))
# Of decoder layers with a state in place of keys. Caches of older versions of transformers have no such layers, and
# full attention is all that is served there.
STATE_LAYERS: tuple[type, ...] = (
    (cache_utils.LinearAttentionLayer,) if hasattr(cache_utils, "LinearAttentionLayer") else ()
)


def with_states(kind: str) -> dict[str, Any]:
    """What a family says of its decoder, some of whose layers have such a state: they are of this kind."""
    return {
        "layer_types": frozenset({"full_attention", *([kind] if STATE_LAYERS else [])}),
        "cache_layers": (DynamicLayer, *STATE_LAYERS),
    }


def core_of(model: Model) -> Model:
    """The multimodal model below a language-modelling head, or the model itself."""
    return model.model if hasattr(model, "lm_head") else model


def decoder_of(core: Model) -> Model:
    decoder = core.language_model
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def input_norm(layer: Model, hidden: Tensor) -> Tensor:
    """What most decoder layers give their attention to work on."""
    normed: Tensor = layer.input_layernorm(hidden)
    return normed


@dataclass(frozen=True)
class Saliency:
    """How salient each visual token is to the vision tower, from one attention of the tower, probed while it runs."""

    # A sentence for the table in docs/transformers.md.
    kind: str
    # core -> the probed attention, or a tuple of them where there are several towers. It has a config and calls the
    # attention function that is named there. Raises NotImplementedError that says what is needed, for a tower that
    # lacks it.
    attention: Callable[[Model], Model | tuple[Model, ...]]
    # (core, query [N, H, M, D], key [N, H, M, D], scale, keyword arguments of the attention) -> what `read` needs of
    # one call.
    see: Callable[[Model, Tensor, Tensor, float, Inputs], Any]
    # (core, inputs, visual tokens of each sample, what `see` gave for each call while the images of this prompt were
    # encoded, in order, at least one) -> [B, V] float32 in the order of the prompt, 0 in the padding. Without a cache,
    # every step of generate is a prompt of the same features, with what was seen when they were encoded.
    read: Callable[[Model, Inputs, list[int], list[Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Family:
    """All that is special to a family of models.

    What differs between versions of transformers is found out from signatures (interface.py), and what differs between
    checkpoints of a family (its vision tower, its decoder) from their modules.
    """

    # In error messages and docs.
    name: str
    # The model_type of the configurations that are served.
    model_types: tuple[str, ...]
    # (core, inputs, visual tokens of each sample) -> layout. The inputs are what `layout_inputs` and `watched` name.
    layout: Callable[[Model, Inputs, list[int]], Layout]
    # The layout in a sentence, for the table in docs/transformers.md.
    grid: str
    # What methods such as AdaFV read of the vision tower; None: unsupported.
    saliency: Saliency | None

    # --- modules ---
    # model -> the multimodal model, whose forward takes input_ids and images.
    core: Callable[[Model], Model] = core_of
    # core -> its decoder (with .layers, .norm and .rotary_emb), called with inputs_embeds.
    decoder: Callable[[Model], Model] = decoder_of

    # --- visual tokens ---
    # The entries of the core's config with the ids that stand for visual tokens in input_ids.
    visual_tokens: tuple[str, ...] = ("image_token_id",)
    # The methods of the core that encode images and videos. generate may call them before the forward.
    encoders: tuple[str, ...] = ("get_image_features",)
    # Methods of the core, and what is remembered of the arguments of their last call: the layout and the saliency find
    # it in their inputs under the method's name. generate hands on nothing else of what it encoded images with.
    watched: Mapping[str, Callable[[Inputs], Any]] = field(default_factory=dict)
    # Arguments of the core's forward that the layout reads. They are kept until somebody asks for it: nothing large.
    layout_inputs: tuple[str, ...] = ("input_ids",)

    # --- the decoder ---
    # Position ids have a row for each axis of the image and carry its geometry: they are never renumbered.
    mrope: bool = False
    # The argument of the core's forward that lets all tokens of a prompt see each other: it has to be given, and
    # methods that read attention are told so (`causal`).
    prefix: str | None = None
    # Features of inner vision layers are added behind the first decoder layers (deepstack.py).
    deepstack: bool = False
    # config of the decoder -> how many tokens a conversation may have until layers count those in their caches, where
    # some are gone; None: they never do.
    counted_to: Callable[[Any], int | None] = lambda config: None
    # Arguments of a decoder layer besides those of all layers, of its own, with a row for each token: [B, L, ...].
    layer_inputs: tuple[str, ...] = ()
    # (decoder layer, its hidden states) -> what its attention works on, of which methods read the projections.
    normed: Callable[[Model, Tensor], Tensor] = input_norm
    # (decoder, index of a layer) -> the module that makes its rotary embeddings.
    rotary: Callable[[Model, int], Model] = lambda decoder, layer: decoder.rotary_emb
    # Layers are given several hidden states of each token, [S, B, L, C]: the entry of the decoder's config that says
    # which of them methods read.
    stack: str | None = None
    # The kinds of decoder layers that are served (kinds.py), as in config.layer_types.
    layer_types: frozenset[str] = frozenset({"full_attention"})
    # Which keys a query sees in a layer with full attention, where the model made no mask that shows it: a new token of
    # text does, as transformers' mask functions take it. A prompt's attention_mask is [B, L] or absent.
    mask_function: Callable[..., Any] = causal_mask_function
    # The layers of a DynamicCache. They must be free to have different lengths, and hold keys and values as they are.
    cache_layers: tuple[type, ...] = (DynamicLayer,)

    def visual_ids(self, config: Any) -> tuple[int, ...]:
        return tuple(getattr(config, name) for name in self.visual_tokens)
