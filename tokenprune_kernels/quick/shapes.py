"""The shapes that real models give our ops. Every benchmark takes its sizes from this table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Sizes of one vision-language model at one image size, from its public configuration."""

    name: str
    tokens: int  # visual tokens N
    grid: tuple[int, int]  # rows, columns of one crop or of the whole image
    crops: int
    query_heads: int
    key_heads: int
    head_dim: int
    hidden: int  # width of the language model, and of projected visual features
    vision_hidden: int
    layers: int
    keep: int  # a usual budget K
    question: int = 64  # text rows M


MODELS = {
    m.name: m
    for m in (
        Model("LLaVA-1.5-7B", 576, (24, 24), 1, 32, 32, 128, 4096, 1024, 32, 128),
        Model("LLaVA-NeXT-7B", 2880, (24, 24), 5, 32, 32, 128, 4096, 1024, 32, 320),
        Model("Qwen2.5-VL-7B@4096", 4096, (64, 64), 1, 28, 4, 128, 3584, 1280, 28, 910),
        Model("Qwen2.5-VL-7B@16384", 16384, (128, 128), 1, 28, 4, 128, 3584, 1280, 28, 1820),
        Model("InternVL3-8B", 3328, (16, 16), 13, 28, 4, 128, 3584, 1024, 28, 740),
    )
}
