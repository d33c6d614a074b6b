"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: a timestamp behind every frame, and one id for the tokens of images and
frames, which the model takes for those of one or the other: no call has both."""

from .frames import RECEIVED, merged_family

FAMILIES = (
    merged_family(
        "GLM-V",
        ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"),
        saliency=RECEIVED,
        visual_tokens=("image_token_id",),
    ),
)
