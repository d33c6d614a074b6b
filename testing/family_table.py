"""The table of docs/transformers.md that follows from the descriptions of the model families."""

from testing.method_tables import code, table
from tokenprune_kernels.integrations.transformers import registry


def families() -> str:
    return table(
        ("model_type", "visual tokens", "grid and groups", "saliency of the vision tower", "decoder"),
        (
            (
                code(family.model_types),
                code(family.visual_tokens),
                family.grid,
                family.saliency.kind if family.saliency else "none",
                ", ".join([
                    *(kind.replace("_", " ") for kind in sorted(family.layer_types)),
                    *["mRoPE"] * family.mrope,
                    *["DeepStack"] * family.deepstack,
                ]),
            )
            for family in registry.families()
        ),
    )  # fmt: skip
