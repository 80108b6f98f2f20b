"""Hugging Face teachers: the same features as transformers itself, from folders written here."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kpu.errors import TeacherError
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
}
INPUT = {"size": 28, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def build(folder: Path, **options: Any) -> FrozenTeacher:
    return build_teacher("t", TeacherConfig.model_validate({"model": f"hf:{folder}", **options}))


def make(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    made = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)
        ),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
        "convnext": lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1])
        ),
        "swin": lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=28, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1])
        ),
    }[kind]()
    made.eval().save_pretrained(folder)
    return made


def noise(teacher: FrozenTeacher) -> torch.Tensor:
    return torch.randint(0, 256, (2, *teacher.input.size, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"),
    [("vit", 1, 2), ("dinov2", 1, 2), ("registers", 5, 2), ("clip", 1, 2), ("siglip", 0, 2), ("swin", 0, 7)],
)
def test_features_are_transformers_own(tmp_path: Path, kind: str, prefix: int, grid: int) -> None:
    reference = make(kind, tmp_path)
    teacher = build(tmp_path, input=INPUT)
    images = noise(teacher)
    found = teacher(images)
    with torch.inference_mode():
        expected = reference(pixel_values=teacher._normalise(images))
    torch.testing.assert_close(found["global"], expected.pooler_output)
    torch.testing.assert_close(found["patch"], expected.last_hidden_state[:, prefix:])
    assert teacher.outputs[1].grid == (grid, grid)
    assert teacher.head is None


def test_maps_of_convolutional_models(tmp_path: Path) -> None:
    reference = make("convnext", tmp_path)
    teacher = build(tmp_path, input={**INPUT, "size": 64}, layers=[0])
    images = noise(teacher)
    found = teacher(images)
    with torch.inference_mode():
        expected = reference(pixel_values=teacher._normalise(images))
    torch.testing.assert_close(found["patch"], expected.last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found["global"], expected.pooler_output)
    assert [output.grid for output in teacher.outputs] == [None, (2, 2), (16, 16)]


def test_layers_and_another_size(tmp_path: Path) -> None:
    reference = make("vit", tmp_path)
    teacher = build(tmp_path, input={**INPUT, "size": 42}, outputs=["patch"], layers=[0, -2])
    assert [output.name for output in teacher.outputs] == ["patch", "layer0.patch", "layer1.patch"]
    assert teacher.outputs[0].grid == (3, 3)
    images = noise(teacher)
    with torch.inference_mode():
        expected = reference(
            pixel_values=teacher._normalise(images), interpolate_pos_encoding=True, output_hidden_states=True
        )
    torch.testing.assert_close(teacher(images)["layer1.patch"], expected.hidden_states[2][:, 1:])
    with pytest.raises(TeacherError, match="layers: expected numbers from 0 to 2, found 3"):
        build(tmp_path, input=INPUT, layers=[3])


def test_a_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    classifier.save_pretrained(tmp_path)
    teacher = build(tmp_path, input=INPUT)
    images = noise(teacher)
    with torch.inference_mode():
        expected = classifier.vit(pixel_values=teacher._normalise(images)).last_hidden_state
    torch.testing.assert_close(teacher(images)["global"], expected[:, 0])


def test_the_vision_tower_of_a_clip_model_is_taken(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config={**text, "vocab_size": 99}, vision_config=SMALL))
    clip.eval().save_pretrained(tmp_path)
    teacher = build(tmp_path, input=INPUT)
    images = noise(teacher)
    with torch.inference_mode():
        expected = clip.vision_model(pixel_values=teacher._normalise(images)).pooler_output
    torch.testing.assert_close(teacher(images)["global"], expected)


def test_random_weights_and_weights_from_a_file(tmp_path: Path) -> None:
    make("dinov2", tmp_path)
    first = build(tmp_path, input=INPUT, weights="random")
    torch.manual_seed(1)
    assert build(tmp_path, input=INPUT, weights="random").weights_digest == first.weights_digest
    state = first._backbone.module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    again = build(tmp_path, input=INPUT, weights=str(tmp_path / "w.safetensors"))
    assert again.weights_digest == first.weights_digest
    name = next(iter(state))
    save_file({**state, name: torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=rf"{name}: expected shape .* found \[3\]"):
        build(tmp_path, input=INPUT, weights=str(tmp_path / "w.safetensors"))


def test_pickled_and_absent_weights_are_refused(tmp_path: Path) -> None:
    reference = make("vit", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="cannot load it from safetensors"):
        build(tmp_path, input=INPUT)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    reference = make("vit", tmp_path)
    state = {name: tensor for name, tensor in reference.state_dict().items() if "layernorm.weight" not in name}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match=r"lacks.*layernorm\.weight"):
        build(tmp_path, input=INPUT)


def test_rejects_folders_that_are_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"expected a Hugging Face model id or a folder"):
        build(tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TeacherError, match=r"pip install 'kpu\[hf\]'"):
        build(tmp_path)
