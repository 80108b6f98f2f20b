"""What families of teachers give: `python benchmarks/teachers.py` prints the tables of docs/teachers.md.

Every model is built with random weights, at its own input size (timm) or with a small configuration (Hugging Face),
and loaded as `kpu-cache extract` would load it.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import transformers

from kpu.errors import TeacherError
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher

TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3", "resnet18",
    "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "pvt_v2_b0", "levit_128", "mobilevit_xxs",
    "mixer_s32_224", "pit_xs_224", "xcit_nano_12_p8_224", "hiera_tiny_224", "crossvit_tiny_240", "cait_xxs24_224",
    "swin_tiny_patch4_window7_224", "coat_tiny",
)  # fmt: skip
PLAIN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {**PLAIN, "image_size": 224, "patch_size": 16}
STAGES = {"depths": [1, 1, 2, 1]}
SIZES = {"hidden_sizes": [8, 16, 24, 32]}
SWIN = {"embed_dim": 16, "num_heads": [1, 2, 2, 4], **STAGES}
PVT = {**SIZES, **STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": 224}
DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, **SIZES, **STAGES, "out_features": ["stage4"]},
}  # fmt: skip
SAM = {**PLAIN, "image_size": 256, "output_channels": 16, "mlp_dim": 48, "global_attn_indexes": [2], "window_size": 4}
SAM2 = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64],
        "blocks_per_stage": [1, 1, 2, 1], "num_attention_heads": 1, "num_attention_heads_per_stage": [1, 1, 2, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [64, 32, 16, 8],
}  # fmt: skip
HF: dict[str, dict[str, Any]] = {
    "vit": VIT, "deit": VIT, "beit": VIT, "vit_msn": VIT, "ijepa": VIT, "dinov2": {**VIT, "patch_size": 14},
    "dinov2_with_registers": {**VIT, "patch_size": 14}, "dinov3_vit": VIT, "clip_vision_model": VIT,
    "siglip_vision_model": VIT, "vit_mae": VIT, "yolos": {**VIT, "image_size": [224, 224]}, "vitdet": VIT,
    "radio": VIT, "swin": SWIN,
    "hiera": {"embed_dim": 16, "num_heads": [1, 2, 4, 8], **STAGES}, "convnext": {**SIZES, **STAGES},
    "resnet": {"embedding_size": 8, **SIZES, **STAGES}, "segformer": PVT, "pvt": PVT, "pvt_v2": PVT,
    "poolformer": {**SIZES, **STAGES}, "swiftformer": {"embed_dims": [8, 16, 24, 32], **STAGES}, "mobilenet_v2": {},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
    "sam_vision_model": SAM, "sam2_vision_model": SAM2, "detr": DETR,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("timm", "hf"))
    only = parser.parse_args().only
    for kind, rows in (("timm", timm_rows), ("hf", hf_rows)):
        if only in (None, kind):
            print(f"\n| {kind} | input | `global`, `pool: auto` | `patch` | `layers` | refused, or not shown |")
            print("|---|---|---|---|---|---|")
            for row in rows():
                print("| " + " | ".join(row) + " |", flush=True)


def timm_rows() -> Iterator[tuple[str, ...]]:
    """A row for each timm model."""
    for name in TIMM:
        layers = len(timm.create_model(name).feature_info)
        yield _row(name, {"model": f"timm:{name}", "weights": "random"}, layers)


def hf_rows() -> Iterator[tuple[str, ...]]:
    """A row for each architecture of Hugging Face, in a folder written for it."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for kind, values in HF.items():
            place = Path(folder) / kind
            config = transformers.AutoConfig.for_model(kind, **values)
            transformers.AutoModel.from_config(config).save_pretrained(place)
            size = 256 if kind.startswith("sam") else 224
            given = {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3}
            yield _row(kind, {"model": f"hf:{place}", "input": given}, 1)


def _row(name: str, config: dict[str, Any], layers: int) -> tuple[str, ...]:
    notes = []
    teacher: FrozenTeacher | None = None
    for outputs in (["global", "patch"], ["global"]):
        try:
            teacher = build_teacher("t", TeacherConfig.model_validate({**config, "outputs": outputs}))
            break
        except TeacherError as error:
            notes.append(_short(error))
    if teacher is None:
        return name, "", "", "", "", notes[0]
    found = "yes"
    try:
        deep = build_teacher(
            "t", TeacherConfig.model_validate({**config, "outputs": [], "layers": sorted({0, layers - 1})})
        )
        notes += [f"{each}: order is its library's word" for each in deep.unproven or ()]
    except TeacherError as error:
        found = "no"
        notes.append(_short(error))
    notes += [f"{each}: order is its library's word" for each in teacher.unproven or ()]
    patch = next((output for output in teacher.outputs if output.name == "patch"), None)
    size = "{} x {}".format(*teacher.input.size)
    grid = "no" if patch is None or patch.grid is None else "{} x {}".format(*patch.grid)
    return name, size, teacher.pooling or "", grid, found, "; ".join(notes)


def _short(error: TeacherError) -> str:
    """A message without the teacher's name, up to its advice."""
    return str(error).partition("): ")[2].partition(";")[0]


if __name__ == "__main__":
    main()
