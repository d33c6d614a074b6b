"""Tiles of an image, which the tower sees as squares, beside a thumbnail (Idefics3, SmolVLM, Ovis2, InternVL3).

Where the prompt says how the tiles are arranged, by the tokens that a processor puts between them, it is read there.
"""

from itertools import groupby

from ..layout import Patches, grid_patches


def tile_patches(rows: int, columns: int, side: int, image: int) -> list[Patches]:
    """Of the tiles of an image, row after row, each of side x side tokens."""
    return [
        grid_patches(side, side, image, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows))
        for r in range(rows)
        for c in range(columns)
    ]


def stretches(ids: list[int], token: int, length: int) -> list[int]:
    """Where in a prompt each tile begins, whose `length` visual tokens stand together."""
    starts, index = [], 0
    for kind, run in groupby(ids):
        count = len(list(run))
        if kind == token:
            if count != length:
                raise NotImplementedError(
                    f"prune_visual_tokens: {count} visual tokens stand together, and a tile has {length}"
                )
            starts.append(index)
        index += count
    return starts


def check_rows(rows: list[int]) -> tuple[int, int]:
    """Rows and columns of the tiles of an image, from how many there are in each row that its prompt has."""
    if rows and len(set(rows)) != 1:
        raise NotImplementedError(
            f"prune_visual_tokens: rows of {', '.join(map(str, rows))} tiles in the prompt of an image are no grid; "
            "put them into the prompt as the processor does"
        )
    return len(rows), rows[0] if rows else 0
