"""Anyone's own teachers, and what holds for every teacher."""

import pickle
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kpu
from kpu.errors import TeacherError
from kpu.format.teacher import CodecSpec
from kpu.util.digests import digest
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher, load_shipped, ship

PREAMBLE = """
import torch
from torch import nn


class Tiny(nn.Module):
    data_config = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.5}

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        patch = self.conv(x)
        return {"global": patch.mean((2, 3)), "patch": patch, "tokens": patch.flatten(2).transpose(1, 2)}


def tiny():
    return Tiny()
"""
SHAPE = (2, 8, 8, 3)


def write(folder: Path, body: str = "", name: str = "mine.py") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(PREAMBLE + dedent(body))
    return path


def config(path: Path | str, factory: str = "tiny", weights: str | None = "random", **options: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": f"torch:{path}:{factory}", "weights": weights, **options})


def build(path: Path | str, factory: str = "tiny", **options: Any) -> FrozenTeacher:
    return build_teacher("t", config(path, factory, **options))


def noise() -> torch.Tensor:
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8)


def test_outputs_head_and_preprocessing(tmp_path: Path) -> None:
    teacher = build(write(tmp_path), layers=["tokens"])
    images = noise()
    found = teacher(images)
    assert [(o.name, o.shape, o.grid) for o in teacher.outputs] == [
        ("global", (4,), None),
        ("patch", (16, 4), (4, 4)),
        ("tokens.patch", (16, 4), (4, 4)),
    ]
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    module = teacher._backbone.module
    with torch.inference_mode():
        expected = module(x)
    torch.testing.assert_close(found["global"], expected["global"])
    torch.testing.assert_close(found["patch"], expected["tokens"])
    assert torch.equal(found["patch"], found["tokens.patch"])
    assert teacher.head is not None
    np.testing.assert_array_equal(teacher.head[0], module.head.weight)
    assert teacher.input.crop == 0.5
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_input_overrides_only_what_it_names(tmp_path: Path) -> None:
    teacher = build(write(tmp_path), input={"size": 16, "interpolation": "bilinear"})
    assert teacher.input.size == (16, 16)
    assert teacher.input.interpolation == "bilinear"
    assert teacher.input.mean == (0.1, 0.2, 0.3)
    assert teacher.outputs[1].grid == (8, 8)


def test_spec_says_what_decides_the_features(tmp_path: Path) -> None:
    path = write(tmp_path)
    spec = build(path, outputs=["global"], labels=[2, None, 0]).spec(CodecSpec())
    assert spec.source_digest == digest(path.read_bytes())
    assert spec.precision == "fp32"
    assert spec.has_head
    assert spec.labels == (2, -1, 0)
    moved = write(tmp_path / "elsewhere")
    assert build(moved, outputs=["global"]).spec(CodecSpec()).model_fingerprint == spec.model_fingerprint


def test_weights_are_loaded_strictly(tmp_path: Path) -> None:
    path = write(tmp_path)
    reference = build(path, weights="random")
    state = reference._backbone.module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert build(path, weights=str(tmp_path / "w.safetensors")).weights_digest == reference.weights_digest
    save_file({**state, "conv.weight": torch.zeros(5, 3, 2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"conv\.weight: expected shape \[4, 3, 2, 2\], found \[5, 3, 2, 2\]"):
        build(path, weights=str(tmp_path / "w.safetensors"))


def test_a_factory_without_weights_must_not_give_random_ones(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        def loading():
            module = Tiny()
            module.load_state_dict({name: torch.ones_like(tensor) for name, tensor in module.state_dict().items()})
            return module

        def headless():
            module = loading()
            module.head = nn.Linear(4, 2)
            return module

        def from_the_clock():
            torch.seed()
            return Tiny()
        """,
    )
    state = torch.get_rng_state()
    assert build(path, "loading", weights=None).weights_digest == build(path, "loading").weights_digest
    for factory, names in (("headless", "head.weight, head.bias"), ("from_the_clock", "conv.weight, conv.bias, head.")):
        with pytest.raises(TeacherError, match=rf"'t' .*:{factory}\): weights: expected .*{names}.*weights: random"):
            build(path, factory, weights=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_factory_may_size_itself_by_the_weights(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        def sized(state_dict=None):
            return Tiny(3 if state_dict is None else len(state_dict["head.weight"]))

        def literal(weights):
            assert weights is None
            return Tiny()
        """,
    )
    state = {**build(path)._backbone.module.state_dict(), "head.weight": torch.ones(9, 4), "head.bias": torch.ones(9)}
    save_file(state, tmp_path / "w.safetensors")
    teacher = build(path, "sized", weights=str(tmp_path / "w.safetensors"))
    assert teacher.head is not None
    assert teacher.head[0].shape == (9, 4)
    assert build(path, "sized").outputs == build(path, "literal").outputs


def emitting(expression: str, before: str = "") -> str:
    return f"""
        class Odd(Tiny):
            def forward(self, x):
                found = super().forward(x)
                {before}
                return {expression}

        def odd():
            return Odd()
        """


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("found['global']", "expected a dict of named tensors, found Tensor"),
        ("{'global': found['global']}", "expected an output 'patch', found global"),
        ("{**found, 'global': found['patch']}", r"'global': expected floating point \[B, D\] .* \[2, 4, 4, 4\]"),
        ("{**found, 'patch': found['tokens'][:, 1:]}", r"'patch': expected .* the image's proportions .* \[2, 15, 4\]"),
        ("{**found, 'patch': found['patch'].long()}", r"'patch': expected floating point .* int64"),
        ("{**found, 'patch': [1]}", "'patch': expected a tensor, found list"),
        ("{**found, 'global': found['global'][:1]}", r"'global': expected .* for B = 2, found float32 \[1, 4\]"),
        ("1 / 0", r"forward pass of images \[2, 3, 8, 8\] failed: ZeroDivisionError at mine\.py:\d+"),
    ],
)
def test_refuses_what_it_cannot_store(tmp_path: Path, expression: str, message: str) -> None:
    path = write(tmp_path, emitting(expression))
    with pytest.raises(TeacherError, match=rf"teacher 't' \(torch:.*mine\.py:odd\): .*{message}"):
        build(path, "odd")


def test_refuses_a_shape_that_changes_between_batches(tmp_path: Path) -> None:
    body = emitting("{**found, 'global': found['global'][:, : 4 - (len(x) > 2)]}")
    teacher = build(write(tmp_path, body), "odd", outputs=["global"])
    with pytest.raises(TeacherError, match=r"'global': expected \[3, 4\] as for the first batch, found \[3, 3\]"):
        teacher(torch.zeros((3, 8, 8, 3), dtype=torch.uint8))


def test_refuses_images_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="expected uint8 images"):
        build(write(tmp_path))(torch.zeros((2, 9, 8, 3), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("body", "factory", "message"),
    [
        ("", "tinny", r"has no factory 'tinny'; did you mean .*tiny"),
        (
            "def fails():\n    raise ValueError('no luck')",
            "fails",
            r"factory raised ValueError at mine\.py:\d+: no luck",
        ),
        ("def greedy(depth):\n    return Tiny()", "greedy", r"expected a factory that needs no argument, found depth"),
        ("def wrong():\n    return 3", "wrong", r"expected the factory to return an nn\.Module, found int"),
        ("import sys; sys.exit(3)", "tiny", r"mine\.py does not import: SystemExit"),
        ("def (", "tiny", r"mine\.py does not import: SyntaxError: .*mine\.py, line"),
        ("Tiny.head = 3\ndef odd():\n    m = Tiny(); del m.head; return m", "odd", r"head: expected an nn\.Linear"),
        ("def odd():\n    m = Tiny(); m.head = nn.Linear(5, 2); return m", "odd", r"head: expected 4 inputs.*found 5"),
        ("def odd():\n    m = Tiny(); m.data_config = {}; return m", "odd", r"preprocessing: size: Field required"),
    ],
)
def test_refuses_what_it_cannot_load(tmp_path: Path, body: str, factory: str, message: str) -> None:
    path = write(tmp_path)
    path.write_text(PREAMBLE + body)
    with pytest.raises(TeacherError, match=message):
        build(path, factory)


def test_refuses_a_file_or_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TeacherError, match=r"expected a Python file at .*none\.py: No such file"):
        build(tmp_path / "none.py")
    write(tmp_path, name="plainfile.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TeacherError, match=r"does not import: .*write torch:plainfile\.py:<factory>"):
        build("plainfile")


def test_labels_must_fit_the_head(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(TeacherError, match="labels: expected 3, one a class, found 2"):
        build(path, labels=[0, 1])
    with pytest.raises(TeacherError, match="labels: expected a linear head on `global` for them, found none"):
        build(path, outputs=["patch"], labels=[0, 1, 2])


def test_a_stray_module_beside_the_file_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "kpu.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "torch.py").write_text("raise RuntimeError('shadowed')")
    before = list(sys.path)
    build(write(tmp_path, "import kpu.errors"))
    assert sys.path == before
    assert sys.modules["kpu"] is kpu


def test_neighbours_are_imported_each_teacher_its_own(tmp_path: Path) -> None:
    for classes in (5, 6):
        folder = tmp_path / str(classes)
        path = write(folder, "from helper import CLASSES\n\ndef helped():\n    return Tiny(CLASSES)")
        (folder / "helper.py").write_text(f"CLASSES = {classes}")
        teacher = build(path, "helped")
        assert teacher.head is not None
        assert len(teacher.head[0]) == classes
    assert "helper" not in sys.modules


def test_an_edited_file_is_what_runs(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = build(path)
    path.write_text(PREAMBLE.replace("classes=3", "classes=4"))
    second = build(path)
    assert first.head is not None and second.head is not None
    assert (len(first.head[0]), len(second.head[0])) == (3, 4)
    assert first.source_digest != second.source_digest


def test_a_shipped_teacher_needs_no_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    here = build(path)
    sent = pickle.dumps(ship(config(path)))
    path.write_text("raise RuntimeError('another version')")
    there = load_shipped("t", pickle.loads(sent), device="cpu", seed=0)
    path.unlink()
    alone = load_shipped("t", pickle.loads(sent), device="cpu", seed=0)
    assert here.spec(CodecSpec()) == there.spec(CodecSpec()) == alone.spec(CodecSpec())


def test_dataclasses_work_in_a_teachers_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Options:
            classes: int = 3

        print(Options(classes=5))
        """
    path = tmp_path / "mine.py"
    path.write_text(dedent(body) + PREAMBLE)
    assert build(path)(noise())["global"].dtype == torch.float32
    assert "Options(classes=5)" in capsys.readouterr().out


def test_lower_precision_still_emits_float32(tmp_path: Path) -> None:
    path = write(tmp_path)
    images = noise()
    full, half = build(path), build(path, precision="bf16")
    assert half.precision == "bf16"
    a, b = full(images)["patch"], half(images)["patch"]
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
