"""The tables of docs/transformers.md that follow from the model families: their descriptions, and their proofs."""

from testing.method_tables import code, table
from testing.proofs import EVERY, PROOFS, Proof
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


def proofs() -> str:
    """What tests/transformers/test_proofs.py proves: of each model and method, how many decoded tokens."""

    def cell(proof: Proof, method: str) -> str:
        return "refused" if method in proof.refuses else str(proof.decoded(method, proof.batches[0]))

    return table(
        ("model_type", "prompts", *(f"`{method}`" for method in EVERY)),
        ((f"`{proof.model_type}`", proof.of, *(cell(proof, method) for method in EVERY)) for proof in PROOFS),
    )
