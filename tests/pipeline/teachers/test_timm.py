"""timm teachers: the same features as timm itself, one forward pass, clear refusals."""

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from kpu.errors import TeacherError
from pipeline.sections import TeacherConfig
from pipeline.teachers import build_teacher
from pipeline.teachers.backbone import input_spec


def build(model: str, **options: Any) -> Any:
    return build_teacher("t", TeacherConfig.model_validate({"model": f"timm:{model}", **options}))


def saved(folder: Path, model: str, **options: Any) -> tuple[torch.nn.Module, str]:
    """A seeded timm model and the file of its weights."""
    torch.manual_seed(0)
    module = timm.create_model(model, **options).eval()
    path = folder / "weights.safetensors"
    save_file(module.state_dict(), path)
    return module, str(path)


def noise(teacher: Any, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, *teacher.input.size, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("model", "prefix"), [("test_vit", 1), ("test_vit2", 1), ("test_convnext", None), ("test_resnet", None)]
)
def test_features_are_timms_own(tmp_path: Path, model: str, prefix: int | None) -> None:
    reference, path = saved(tmp_path, model)
    teacher = build(model, weights=path)
    images = noise(teacher)
    to_tensor, normalize = create_transform(**resolve_model_data_config(reference)).transforms[-2:]
    x = torch.stack([normalize(to_tensor(Image.fromarray(image.numpy()))) for image in images])
    with torch.inference_mode():
        final = reference.forward_features(x)
        expected = reference.forward_head(final, pre_logits=True)
        tokens = final.flatten(2).transpose(1, 2) if prefix is None else final[:, prefix:]
    found = teacher(images)
    torch.testing.assert_close(found["global"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patch"], tokens, rtol=1e-5, atol=1e-5)
    assert all(each.dtype == torch.float32 and each.is_contiguous() for each in found.values())
    height, width = teacher.outputs[1].grid
    assert teacher.outputs[1].shape == (height * width, tokens.shape[2])


def test_nhwc_models_give_maps_in_the_right_order(tmp_path: Path) -> None:
    reference, path = saved(tmp_path, "test_mambaout")
    teacher = build("test_mambaout", weights=path)
    found = teacher(noise(teacher))
    assert teacher.outputs[1].grid == (5, 5)
    assert teacher.outputs[1].shape == (25, reference.num_features)
    assert found["patch"].shape == (2, 25, reference.num_features)


def test_all_outputs_come_from_one_forward_pass() -> None:
    teacher = build("test_vit", weights="random", layers=[1, -1])
    passes = []
    teacher._backbone.module.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    teacher(noise(teacher))
    assert len(passes) == 1


def test_layers_are_timms_intermediates(tmp_path: Path) -> None:
    reference, path = saved(tmp_path, "test_vit")
    teacher = build("test_vit", weights=path, outputs=["patch"], layers=[-1, 1])
    assert [output.name for output in teacher.outputs] == ["patch", "layer5.patch", "layer1.patch"]
    images = noise(teacher)
    found = teacher(images)
    with torch.inference_mode():
        first, last = reference.forward_intermediates(
            teacher._normalise(images), indices=[1, 5], intermediates_only=True
        )
        torch.testing.assert_close(found["layer1.patch"], first.flatten(2).transpose(1, 2))
        torch.testing.assert_close(found["layer5.patch"], last.flatten(2).transpose(1, 2))
        torch.testing.assert_close(found["patch"], reference.norm(found["layer5.patch"]))


@pytest.mark.parametrize("layers", [[6], [-7], ["block6"], [1, 1], [5, -1]])
def test_refuses_layers_that_are_not_there(layers: list[Any]) -> None:
    with pytest.raises(TeacherError, match=r"layers: expected (numbers from 0 to 5|each once)"):
        build("test_vit", weights="random", layers=layers)


def test_head_on_global_gives_the_logits(tmp_path: Path) -> None:
    reference, path = saved(tmp_path, "test_resnet", num_classes=7)
    teacher = build("test_resnet", weights=path, labels=[3, None, 0, 1, 2, 4, 5])
    images = noise(teacher)
    weight, bias = teacher.head
    assert weight.dtype == bias.dtype == np.float32
    ours = teacher(images)["global"].numpy() @ weight.T + bias
    with torch.inference_mode():
        theirs = reference(teacher._normalise(images)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert teacher.labels == (3, -1, 0, 1, 2, 4, 5)


def test_the_last_layer_of_a_whole_head_is_kept() -> None:
    args = {"depth": 1, "global_attn_indexes": [0], "embed_dim": 96, "num_heads": 2}
    teacher = build("samvit_base_patch16_224", weights="random", outputs=["global"], model_args=args)
    assert teacher.no_head is None
    images = noise(teacher)
    weight, bias = teacher.head
    with torch.inference_mode():
        theirs = teacher._backbone.module(teacher._normalise(images)).numpy()
    np.testing.assert_allclose(teacher(images)["global"].numpy() @ weight.T + bias, theirs, rtol=1e-4, atol=1e-5)


def test_two_heads_are_no_head() -> None:
    teacher = build("deit_tiny_distilled_patch16_224", weights="random")
    assert teacher.head is None
    assert teacher.outputs[1].grid == (14, 14)


def test_weights_without_a_classifier_load(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_vit", num_classes=0)
    assert build("test_vit", weights=path).head is None


def test_input_of_another_size_reaches_the_model(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_vit")
    teacher = build("test_vit", weights=path, input={"size": 96, "mean": [0, 0, 0], "crop": 1.0})
    assert teacher.input.size == (96, 96)
    assert teacher.input.mean == (0.0, 0.0, 0.0)
    assert teacher.input.std == (0.5, 0.5, 0.5)
    assert teacher.outputs[1].grid == (6, 6)
    oblong = build("test_resnet", weights="random", input={"size": [64, 96]})
    assert oblong.outputs[1].grid == (2, 3)
    assert build("test_vit", weights="random", input={"size": [64, 96]}).outputs[1].grid == (4, 6)


def test_a_model_that_squashes_says_so() -> None:
    module = timm.create_model("test_vit", pretrained_cfg_overlay={"crop_mode": "squash"})
    assert input_spec(resolve_model_data_config(module), None, "t").crop_mode == "squash"
    assert build("test_vit", weights="random").input.crop_mode == "center"


@pytest.mark.slow
def test_dinov2_runs_at_224() -> None:
    teacher = build("vit_small_patch14_dinov2", weights="random", input={"size": 224})
    assert teacher.outputs[1].shape == (256, 384)
    assert teacher.outputs[1].grid == (16, 16)


def test_random_weights_are_a_function_of_model_and_seed() -> None:
    config = TeacherConfig(model="timm:test_vit", weights="random", outputs=("global",))
    torch.manual_seed(3)
    first = build_teacher("a", config, seed=0)
    torch.manual_seed(4)
    second = build_teacher("b", config, seed=0)
    other = build_teacher("a", config, seed=1)
    assert first.weights_digest == second.weights_digest != other.weights_digest
    images = noise(first)
    assert torch.equal(first(images)["global"], second(images)["global"])


def test_an_unknown_model_is_named_with_its_neighbours() -> None:
    with pytest.raises(TeacherError, match=r"no model 'vit_smal_patch16_224'; did you mean .*vit_small_patch16_224"):
        build("vit_smal_patch16_224", weights="random")
    with pytest.raises(TeacherError, match=r"no weights tagged 'a1_in1'; did you mean .*resnet18\.a1_in1k"):
        build("resnet18.a1_in1", weights="random")


@pytest.mark.parametrize("weights", ["random", None])
@pytest.mark.parametrize("name", ["x:y", "hf-hub:", "local-dir:", "resnet18:a1_in1k", ":resnet18"])
def test_a_name_with_a_stray_colon_is_no_model(name: str, weights: str | None) -> None:
    with pytest.raises(TeacherError, match=rf"model: expected timm:<model>, .* found timm:{name}, which names no") as e:
        build(name, weights=weights)
    assert "weights" not in str(e.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "test_vit2")
    with pytest.raises(TeacherError, match=r"timm:test_vit\): weights: .* does not fit: .*expected .*found"):
        build("test_vit", weights=path)


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(TeacherError, match=r"could not get the pretrained weights .*cannot be reached.*`random`"):
        build("test_vit")


def test_a_model_without_a_map_says_so() -> None:
    with pytest.raises(TeacherError, match="patch: expected final features that map the image"):
        build("pit_ti_224", weights="random")
    assert build("pit_ti_224", weights="random", outputs=["global"]).outputs[0].name == "global"


def test_what_timm_pools_is_named_and_chosen(tmp_path: Path) -> None:
    reference, path = saved(tmp_path, "test_vit")
    teacher = build("test_vit", weights=path)
    assert teacher.pooling == "class token"
    images = noise(teacher)
    with torch.inference_mode():
        final = reference.forward_features(teacher._normalise(images))
    mean = build("test_vit", weights=path, pool="mean")
    torch.testing.assert_close(mean(images)["global"], final[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
    assert (mean.pooling, mean.head) == ("mean of patches", None)  # the classifier saw the class token
    both = build("test_vit", weights=path, pool="cls+mean", outputs=["global"])
    assert (both.pooling, both.outputs[0].shape) == ("class token and mean of patches", (128,))
    assert build("test_resnet", weights="random").pooling == "mean of patches"


def test_a_class_token_of_each_stage_is_named_and_chosen() -> None:
    options = {"weights": "random", "outputs": ["global"], "input": {"size": 64}}
    small = {"model_args": {"serial_depths": [1] * 4, "embed_dims": [32] * 4}}
    teacher, chosen = (build("coat_lite_tiny", **options, **small, pool=pool) for pool in ("auto", "cls"))
    assert (teacher.pooling, chosen.pooling) == ("class token", "class token")
    images = noise(teacher)
    torch.testing.assert_close(chosen(images)["global"], teacher(images)["global"])


def test_pool_that_timm_cannot_give_is_refused() -> None:
    for pool in ("cls", "cls+mean"):
        with pytest.raises(TeacherError, match="expected a model with a class token, found none; use auto or mean"):
            build("test_resnet", weights="random", pool=pool)
    with pytest.raises(TeacherError, match=r"pool: expected auto, cls, mean or cls\+mean of a timm model"):
        build("test_resnet", weights="random", pool="pooler")


def test_a_mean_of_two_class_tokens_is_named() -> None:
    teacher = build("deit_tiny_distilled_patch16_224", weights="random", outputs=["global"])
    assert teacher.pooling == "mean of class and distillation tokens"
