"""What a timm teacher may be told, which classifiers are kept, and how the others say that they are not."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.models.metaformer import MlpHead
from torch import nn

from kpu.commit.teacher import check_same, list_differences
from kpu.errors import ConfigError, TeacherError
from kpu.format.teacher import CodecSpec, TeacherSpec
from kpu.format.timm_args import LAYERS, check_model_args, with_layers
from pipeline.checks import warn_of_heads
from pipeline.config import load_config
from pipeline.recorded import teacher_config
from pipeline.run.observers import Silent
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from pipeline.teachers.backbone import reason
from pipeline.teachers.timm.classifiers import linear_head
from tests.support.toys import kpu, write_images
from trainer.students.models import build_base

DISTILLED, SMALL = "deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 12, "num_heads": 3}
UNI2 = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "reg_tokens": 4, "init_values": 1e-5, "no_embed_class": True}


def build(model: str, weights: str = "random", **options: Any) -> FrozenTeacher:
    config = {"model": f"timm:{model}", "weights": weights, **options}
    return build_teacher("t", TeacherConfig.model_validate(config))


def spec(teacher: FrozenTeacher) -> TeacherSpec:
    return teacher.spec(CodecSpec())


def spread(model: nn.Module) -> nn.Module:
    """The model with values and statistics that are not those of a beginning, so that a wrong head would show."""
    torch.manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(
    "model", ["dla46x_c", "levit_128s", "efficientformerv2_s0", "crossvit_tiny_240", "repvit_m0_9", "test_vit"]
)
def test_a_classifier_that_is_linear_on_global_is_kept(model: str, tmp_path: Path) -> None:
    """A convolution, a normalisation before it, means of two, of two on two parts and of two behind normalisations."""
    reference = spread(timm.create_model(model, num_classes=7))
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    teacher = build(model, str(tmp_path / "w.safetensors"), outputs=["global"], model_args={"num_classes": 7})
    assert teacher.head is not None and teacher.no_head is None
    images = torch.randint(0, 256, (2, *teacher.input.size, 3), dtype=torch.uint8)
    weight, bias = (torch.from_numpy(part) for part in teacher.head)
    with torch.inference_mode():
        expected = reference(teacher._normalise(images))
    torch.testing.assert_close(teacher(images)["global"] @ weight.T + bias, expected, rtol=1e-3, atol=1e-4)


def test_a_classifier_that_is_not_kept_is_told() -> None:
    why = "its classifier, applied to global, does not give the model's own answers"

    class Heard(Silent):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    teacher, heard = build(DISTILLED, outputs=["global"], input={"size": 64}, model_args=SMALL), Heard()
    made = spec(teacher)
    assert not made.has_head
    assert made.no_head == why
    warn_of_heads([made], heard)
    assert heard.warnings == [f"teacher 't': keeps no head: {why}; nothing else of it is missing"]
    assert "no_head" not in made.model_part
    assert list_differences(made.model_copy(update={"no_head": None}), made) == []
    with pytest.raises(TeacherError, match=r"labels: expected a linear head .*found none \(its classifier"):
        build(DISTILLED, outputs=["global"], labels=[0], input={"size": 64}, model_args=SMALL)


def test_a_classifier_of_another_kind_is_named() -> None:
    assert linear_head(MlpHead(8, 4)) == (None, "its classifier (MlpHead) is not one linear layer on global")
    two = (nn.Linear(8, 4), nn.Linear(8, 5))
    assert linear_head(two) == (None, "its classifier (Linear) is not one linear layer on global")


def test_a_model_without_a_classifier_has_nothing_to_tell() -> None:
    assert linear_head(nn.Identity()) == (None, None)
    assert spec(build("test_vit", model_args={"num_classes": 0})).no_head is None


def test_a_cache_that_was_begun_without_a_head_goes_on() -> None:
    made = spec(build("test_vit"))
    check_same(made.model_copy(update={"has_head": False}), made)
    assert list_differences(made, made.model_copy(update={"has_head": False})) == [
        "has_head: expected true, found false"
    ]


def test_info_says_why_there_is_no_head(tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images", 3), tmp_path / "o.kpu"
    args = f"teachers.t.model_args={json.dumps(SMALL)}"
    keys = (args, "teachers.t.weights=random", "teachers.t.outputs=[global]", "teachers.t.input.size=64")
    options = [part for key in keys for part in ("--set", key)]
    result = kpu("extract", images, "-o", out, "-t", f"t=timm:{DISTILLED}", *options)
    assert result.exit_code == 0
    assert "warning: teacher 't': keeps no head: its classifier" in result.stderr
    shown = kpu("info", out).stdout
    assert "head     none: its classifier, applied to global, does not give" in shown
    assert "args     depth: 1, embed_dim: 12, num_heads: 3" in shown


def test_arguments_reach_the_model_and_are_remembered(tmp_path: Path) -> None:
    reference = spread(timm.create_model("test_vit", **with_layers(UNI2, nn, timm.layers)))
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    teacher = build("test_vit", str(tmp_path / "w.safetensors"), model_args=UNI2)
    images = torch.randint(0, 256, (2, *teacher.input.size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        final = reference.forward_features(teacher._normalise(images))
    assert isinstance(reference.blocks[0].mlp, timm.layers.GluMlp)
    torch.testing.assert_close(teacher(images)["patch"], final[:, 5:], rtol=1e-4, atol=1e-4)

    made = spec(teacher)
    assert made.model_args == UNI2
    again = TeacherSpec.model_validate_json(made.model_dump_json())
    assert again == made
    assert build_teacher("t", teacher_config(again)).spec(CodecSpec()) == made
    base = build_base(made, ("patch",), seed=0)
    with torch.inference_mode():
        torch.testing.assert_close(base(teacher._normalise(images))["patch"], teacher(images)["patch"])
    other = {**UNI2, "act_layer": "GELU"}
    acting = spec(build("test_vit", str(tmp_path / "w.safetensors"), model_args=other))
    assert acting.weights_digest == made.weights_digest
    assert list_differences(made, acting) == ['model_args.act_layer: expected "SiLU", found "GELU"']
    assert made.model_differences(acting) == ["model_args"]


def test_without_arguments_nothing_is_added_to_what_is_remembered() -> None:
    made = spec(build("test_vit"))
    assert made.model_args is None
    assert {"model_args", "no_head", "extra_digest"}.isdisjoint({*made.model_dump(mode="json"), *made.model_part})
    assert spec(build("test_vit", model_args={})) == made


def test_every_layer_that_may_be_named_is_there() -> None:
    found = with_layers({f"{name}_layer": name for name in LAYERS}, nn, timm.layers)
    kinds = [each.func if isinstance(each, partial) else each for each in found.values()]
    assert all(issubclass(kind, nn.Module) for kind in kinds)
    assert with_layers({"global_pool": "GELU"}, nn, timm.layers) == {"global_pool": "GELU"}


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (
            "timm:test_vit",
            {"pretrained": True},
            "model_args: expected arguments of the architecture, found pretrained; it takes weights",
        ),
        ("timm:test_vit", {"checkpoint_path": "x"}, "found checkpoint_path; it takes weights"),
        ("timm:test_vit", {"pretrained_cfg": "x"}, "found pretrained_cfg"),
        ("timm:test_vit", {"in_chans": 1}, "found in_chans; it takes teachers of three channels"),
        ("timm:test_vit", {"mlp_layer": "os.system"}, "model_args: mlp_layer: expected one of GELU, ReLU"),
        ("timm:test_vit", {"depth": {"a": 1}}, "depth: expected a plain value or a list of them, found {'a': 1}"),
        ("torch:a.py:b", {"depth": 1}, "model_args: expected a timm: model with them, found torch:"),
    ],
)
def test_arguments_of_another_kind_are_refused(tmp_path: Path, model: str, args: Any, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        json.dumps({"data": {"source": "x"}, "out": "o", "teachers": {"t": {"model": model, "model_args": args}}})
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in str(caught.value)


def test_a_number_is_finite() -> None:
    with pytest.raises(ValueError, match="init_values: expected a plain value or a list of them, found nan"):
        check_model_args({"init_values": float("nan")})


def test_a_cache_cannot_bring_other_arguments() -> None:
    stated = spec(build("test_vit")).model_dump(mode="json")
    with pytest.raises(ValidationError, match="found pretrained_cfg_overlay"):
        TeacherSpec.model_validate({**stated, "model_args": {"pretrained_cfg_overlay": {"url": "http://x"}}})


def test_arguments_that_the_model_lacks_are_named() -> None:
    with pytest.raises(TeacherError, match=r"timm cannot build it with model_args depht: .*'depht'"):
        build("test_vit", model_args={"depht": 3})
    with pytest.raises(TeacherError, match=r"model_args\.img_size: expected it or input\.size, found both"):
        build("test_vit", model_args={"img_size": 96}, input={"size": 96})


def test_global_without_pooling_is_refused_by_name() -> None:
    with pytest.raises(
        TeacherError,
        match=r"timm pools nothing .*set pool: cls, mean or cls\+mean, or model_args: \{global_pool: token\}",
    ):
        build("test_vit", model_args={"global_pool": ""})
    assert spec(build("test_vit", model_args={"global_pool": ""}, pool="cls")).outputs[0].shape == (64,)
    tokens = build("test_vit", model_args={"global_pool": ""}, outputs=["patch"])
    assert [output.name for output in tokens.outputs] == ["patch"]
    assert spec(build("test_vit", model_args={"global_pool": "avg"})).outputs[0].shape == (64,)


@pytest.mark.parametrize("channels", [1, 12])
def test_other_than_three_channels_are_refused_by_name(tmp_path: Path, channels: int) -> None:
    """As the hub has them: the configuration says it, and pydantic would have asked for `mean.1`."""
    model = timm.create_model("test_vit", in_chans=channels)
    own = {"input_size": [channels, 160, 160], "mean": [0.5] * channels, "std": [0.5] * channels}
    config = {"architecture": "test_vit", "model_args": {"in_chans": channels}, "pretrained_cfg": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = rf"expected a teacher of three channels, red, green, blue, found {channels} in its mean; .*torch: factory"
    with pytest.raises(TeacherError, match=found):
        build_teacher("t", TeacherConfig(model=f"timm:local-dir:{tmp_path}"))


def test_other_crop_modes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"input\.crop_mode: expected .*center.*squash.*, found 'border'"):
        load_config(None, data="x", out="o", teachers=["t=timm:x"], overrides=["teachers.t.input.crop_mode=border"])


def test_models_that_bring_code_are_not_advised_a_key_that_is_not_there(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    del transformers
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.MyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "mine.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(
        TeacherError, match=r"it needs Python code that comes with its weights, .*a torch: factory"
    ) as caught:
        build_teacher("t", TeacherConfig(model=f"hf:{tmp_path}"))
    assert "trust_remote_code" not in str(caught.value)
    assert reason(ValueError("plain")) == "ValueError: plain"
