"""Maps, layers and pooling of Hugging Face models: as transformers itself gives them, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpu.errors import TeacherError
from kpu.format.teacher import CodecSpec
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from pipeline.teachers.hf.maps import read_facts, reading_of

transformers = pytest.importorskip("transformers")

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
STAGES = {"depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}


@pytest.fixture(autouse=True)
def nothing_is_proven_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def save(folder: Path, kind: str, **values: Any) -> Any:
    """A model of `kind` with seeded weights strong enough that no layer is a mere shortcut."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model


def build(folder: Path, size: int | tuple[int, int], **options: Any) -> FrozenTeacher:
    given = {"size": size, "mean": [0.5] * 3, "std": [0.5] * 3}
    return build_teacher("t", TeacherConfig.model_validate({"model": f"hf:{folder}", "input": given, **options}))


def run(teacher: FrozenTeacher, model: Any, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """The teacher's features of two noise images, and the model's own answer."""
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, *teacher.input.size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        return teacher(images), model(pixel_values=teacher._normalise(images), **options)


def grids(teacher: FrozenTeacher) -> dict[str, tuple[int, int] | None]:
    return {output.name: output.grid for output in teacher.outputs}


def test_sam2_maps_have_channels_last(tmp_path: Path) -> None:
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64],
        "blocks_per_stage": [1, 1, 2, 1], "num_attention_heads": 1, "num_attention_heads_per_stage": [1, 1, 2, 2],
        "global_attention_blocks": [3],
    }  # fmt: skip
    model = save(tmp_path, "sam2_vision_model", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8])
    teacher = build(tmp_path, 256, layers=[0, 2, -1])
    assert grids(teacher) == {
        "global": None, "patch": (8, 8), "layer0.patch": (64, 64), "layer2.patch": (16, 16), "layer4.patch": (8, 8),
    }  # fmt: skip
    found, expected = run(teacher, model, output_hidden_states=True)
    torch.testing.assert_close(found["patch"], expected.last_hidden_state.flatten(1, 2))
    torch.testing.assert_close(found["global"], expected.last_hidden_state.mean((1, 2)))
    torch.testing.assert_close(found["layer0.patch"], expected.hidden_states[1].flatten(1, 2))
    assert teacher.pooling == "mean of patches"


def test_layers_of_sam_have_channels_last_and_its_neck_first(tmp_path: Path) -> None:
    values = {
        **PLAIN, "image_size": 128, "patch_size": 16, "output_channels": 12, "mlp_dim": 48, "window_size": 4,
        "global_attn_indexes": [1],
    }  # fmt: skip
    model = save(tmp_path, "sam_vision_model", **values)
    teacher = build(tmp_path, 128, layers=[0])
    assert grids(teacher) == {"global": None, "patch": (8, 8), "layer0.patch": (8, 8)}
    found, expected = run(teacher, model, output_hidden_states=True)
    torch.testing.assert_close(found["layer0.patch"], expected.hidden_states[1].flatten(1, 2))
    torch.testing.assert_close(found["patch"], expected.last_hidden_state.flatten(2).transpose(1, 2))


def test_layers_of_hiera_are_in_the_images_order(tmp_path: Path) -> None:
    values = {"image_size": [128, 128], "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}
    model = save(tmp_path, "hiera", **values)
    teacher = build(tmp_path, 128, layers=[0, -1])
    found, expected = run(teacher, model, output_hidden_states=True)
    reshaped = expected.reshaped_hidden_states
    torch.testing.assert_close(found["layer0.patch"], reshaped[1].flatten(1, 2))
    torch.testing.assert_close(found["layer3.patch"], reshaped[4].flatten(1, 2))
    assert grids(teacher) == {"global": None, "patch": (4, 4), "layer0.patch": (32, 32), "layer3.patch": (4, 4)}


@pytest.mark.parametrize("kind", ["segformer", "pvt_v2", "poolformer"])
def test_layer_0_is_the_first_stage_where_no_embeddings_come_first(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path, kind, hidden_sizes=[8, 16, 24, 32], image_size=128, **STAGES)
    teacher = build(tmp_path, 128, outputs=["patch"], layers=[0, 1, -1])
    assert grids(teacher) == {
        "patch": (4, 4), "layer0.patch": (32, 32), "layer1.patch": (16, 16), "layer3.patch": (4, 4),
    }  # fmt: skip
    found, expected = run(teacher, model, output_hidden_states=True)
    first = expected.hidden_states[0]
    torch.testing.assert_close(found["layer0.patch"], first.flatten(2).transpose(1, 2))


def test_other_numbers_of_hidden_states_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "swiftformer", embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    with pytest.raises(TeacherError, match=r"layers: expected 4 or 5 hidden states .* found 8,.* leave layers out"):
        build(tmp_path, 64, outputs=["global"], layers=[0])
    assert grids(build(tmp_path, 64)) == {"global": None, "patch": (2, 2)}


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_a_masked_autoencoder_sees_all_patches_in_order(tmp_path: Path, mask_ratio: float) -> None:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    values = {**PLAIN, **decoder, "decoder_intermediate_size": 16, "image_size": 48, "patch_size": 8}
    model = save(tmp_path, "vit_mae", mask_ratio=mask_ratio, **values)
    teacher = build(tmp_path, 48, layers=[0])
    assert grids(teacher) == {"global": None, "patch": (6, 6), "layer0.patch": (6, 6)}
    model.config.mask_ratio = 0.0
    found, expected = run(teacher, model, noise=torch.arange(36.0).expand(2, 36))
    torch.testing.assert_close(found["patch"], expected.last_hidden_state[:, 1:])
    assert teacher.pooling == "class token"


def test_maps_of_oblong_images(tmp_path: Path) -> None:
    save(tmp_path / "vit", "siglip_vision_model", **PLAIN, image_size=64, patch_size=8)
    assert grids(build(tmp_path / "vit", (32, 128)))["patch"] == (4, 16)
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4, "patch_size": 4}
    model = save(tmp_path / "swin", "swin", image_size=(64, 256), **swin)
    teacher = build(tmp_path / "swin", (64, 256), layers=[0])
    assert grids(teacher) == {"global": None, "patch": (8, 32), "layer0.patch": (8, 32)}
    found, expected = run(teacher, model)
    torch.testing.assert_close(found["patch"], expected.last_hidden_state)


def test_object_queries_are_no_map(tmp_path: Path) -> None:
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    values = {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 100,
    }  # fmt: skip
    save(tmp_path, "detr", backbone_config={**resnet, "out_features": ["stage4"]}, **values)
    for outputs in (["global", "patch"], ["global"], ["patch"]):
        with pytest.raises(TeacherError, match="found that of a decoder, whose tokens are object queries"):
            build(tmp_path, 64, outputs=outputs)


def test_detection_tokens_are_left_out(tmp_path: Path) -> None:
    model = save(tmp_path, "yolos", **PLAIN, image_size=[64, 96], patch_size=16, num_detection_tokens=10)
    teacher = build(tmp_path, (64, 96))
    found, expected = run(teacher, model)
    assert grids(teacher) == {"global": None, "patch": (4, 6)}
    torch.testing.assert_close(found["patch"], expected.last_hidden_state[:, 1:25])


def test_what_the_model_pools_is_named(tmp_path: Path) -> None:
    values = {**PLAIN, "image_size": 28, "patch_size": 14}
    names = {
        "dinov2": "class token", "siglip_vision_model": "attention pool", "ijepa": "mean of patches",
        "clip_vision_model": "pooler output", "vit_msn": "class token",
    }  # fmt: skip
    for kind, name in names.items():
        save(tmp_path / kind, kind, **values)
        assert build(tmp_path / kind, 28).pooling == name
        assert build(tmp_path / kind, 28, outputs=["patch"]).pooling is None


def test_pool_chooses_what_global_is(tmp_path: Path) -> None:
    model = save(tmp_path, "dinov2_with_registers", **PLAIN, image_size=56, patch_size=14, num_register_tokens=4)
    _, expected = run(build(tmp_path, 56), model)
    tokens = expected.last_hidden_state
    cls, mean = tokens[:, 0], tokens[:, 5:].mean(1)
    fingerprints = set()
    for pool, wanted in {"auto": cls, "cls": cls, "mean": mean, "cls+mean": torch.cat([cls, mean], 1)}.items():
        teacher = build(tmp_path, 56, pool=pool)
        found, _ = run(teacher, model)
        torch.testing.assert_close(found["global"], wanted)
        spec = teacher.spec(CodecSpec())
        assert spec.pool == (None if pool == "auto" else pool)
        assert spec.pooling is not None
        fingerprints.add(spec.model_fingerprint)
    assert len(fingerprints) == 4


def test_pool_that_a_model_lacks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "ijepa", **PLAIN, image_size=28, patch_size=14)
    for pool in ("cls", "cls+mean"):
        with pytest.raises(TeacherError, match=f"pool: {pool[:3]}.*expected a model with a class token, found none"):
            build(tmp_path, 28, pool=pool)
    with pytest.raises(TeacherError, match="pool: pooler: expected a model that pools by itself"):
        build(tmp_path, 28, pool="pooler")
    with pytest.raises(ValueError, match="pool: expected global among outputs"):
        build(tmp_path, 28, pool="mean", outputs=["patch"])


def test_radios_summary_is_its_global(tmp_path: Path) -> None:
    values = {**PLAIN, "image_size": 64, "patch_size": 16, "num_cls_tokens": 3, "summary_idxs": [0, 2]}
    model = save(tmp_path, "radio", **values)
    teacher = build(tmp_path, 64)
    found, expected = run(teacher, model)
    torch.testing.assert_close(found["global"], expected.summary)
    torch.testing.assert_close(found["patch"], expected.features)
    assert (teacher.outputs[0].shape, teacher.pooling) == ((64,), "summary")


@pytest.mark.parametrize(
    ("shape", "image", "layout", "grid"),
    [
        ((2, 256, 32), (64, 256), "tokens", (8, 32)),
        ((2, 32, 8, 8), (64, 64), "channels first", (8, 8)),
        ((2, 8, 8, 32), (64, 64), "channels last", (8, 8)),
        ((2, 32, 32, 8), (256, 256), "channels last", (32, 32)),  # 8 is not stated, but 32 x 8 is no square
        ((2, 102, 32), (800, 1066), None, None),
        ((2, 64), (64, 64), None, None),
    ],
)
def test_how_a_shape_is_read(
    shape: tuple[int, ...], image: tuple[int, int], layout: str | None, grid: tuple[int, int] | None
) -> None:
    facts = read_facts(transformers.AutoConfig.for_model("convnext", hidden_sizes=[32], depths=[1]))
    found = reading_of(shape, image, facts)
    assert (found and found.layout, found and found.grid) == (layout, grid)


def test_towers_that_cannot_be_loaded_alone_are_refused_with_the_way_round(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        "metaclip_2",
        text_config={**text, "vocab_size": 99},
        vision_config={**PLAIN, "image_size": 28, "patch_size": 14},
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"found MetaClip2VisionConfig, .* vision tower as docs/teachers\.md shows"):
        build(tmp_path, 28)


def test_states_of_blocks_are_no_layers(tmp_path: Path) -> None:
    """PVT gives one for each block and the last one again; with a block a stage these are as many as stages and one."""
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}
    save(tmp_path, "pvt", image_size=64, **stages)
    assert build(tmp_path, 64, outputs=["global"]).outputs
    with pytest.raises(TeacherError, match=r"one for each block and the last one once more.*leave layers out"):
        build(tmp_path, 64, outputs=["global"], layers=[0])
