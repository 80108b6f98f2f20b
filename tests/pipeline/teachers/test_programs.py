"""Teachers that are compiled programs, or compute with more than a state_dict: they run, and other weights show."""

import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

from kpu.commit.teacher import check_same, list_differences
from kpu.errors import ConfigError, TeacherError
from kpu.format.teacher import CodecSpec, TeacherSpec
from kpu.trust.code import CodeLoader
from kpu.trust.list import Trust
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from trainer.students.factories import from_factory

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")

INPUT = {"size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Net(nn.Module):
    """A constant that no state_dict has, dropout and batch normalisation, which differ in training, and a head."""

    def __init__(self, seed: int, constant: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution, self.norm, self.dropout = nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Dropout()
        self.head = nn.Linear(4, 3)
        self.constant = torch.full((1, 4, 1, 1), constant)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        patch = self.dropout(self.norm(self.convolution(x))) * self.constant
        return {"global": patch.mean((2, 3)), "patch": patch}


def teacher(folder: Path, body: str, **options: Any) -> FrozenTeacher:
    """A teacher whose factory `make` is written to `folder`, beside which the files are that it reads."""
    file = folder / "mine.py"
    file.write_text(
        "import torch\nfrom pathlib import Path\nfrom torch import nn\n\nHERE = Path(__file__).parent\n" + dedent(body)
    )
    return build_teacher("t", TeacherConfig.model_validate({"model": f"torch:{file}:make", "input": INPUT, **options}))


def spec(made: FrozenTeacher) -> TeacherSpec:
    return made.spec(CodecSpec())


SCRIPT = "def make():\n    return torch.jit.load(HERE / 'net.pt')\n"
EXPORT = "def make():\n    return torch.export.load(HERE / 'net.pt2')\n"
WITHIN = """
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.export.load(HERE / 'net.pt2').module()

        def forward(self, x):
            return self.net(x)

    def make():
        return Wrapper()
"""


def save(folder: Path, kind: str, net: nn.Module) -> None:
    """Compile `net` as `kind` says."""
    example = torch.zeros(2, 3, 8, 8)
    if kind == "exported":
        program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, folder / "net.pt2")
        return
    made = torch.jit.trace(net, example, strict=False) if kind == "traced" else torch.jit.script(net)
    torch.jit.save(torch.jit.freeze(made) if kind == "frozen" else made, folder / "net.pt")


@pytest.mark.parametrize(
    ("kind", "body"),
    [("scripted", SCRIPT), ("traced", SCRIPT), ("frozen", SCRIPT), ("exported", EXPORT), ("exported", WITHIN)],
    ids=["scripted", "traced", "frozen", "exported", "within"],
)
def test_a_program_runs_and_other_weights_are_another_teacher(tmp_path: Path, kind: str, body: str) -> None:
    save(tmp_path, kind, Net(0).eval())
    first, same = teacher(tmp_path, body), teacher(tmp_path, body)
    found = first(images := torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8))
    with torch.inference_mode():
        expected = Net(0).eval()((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found["patch"], expected["patch"].flatten(2).transpose(1, 2))
    torch.testing.assert_close(found["global"], expected["global"])
    assert (first.head is not None) == (kind != "frozen" and body is not WITHIN)
    assert spec(first) == spec(same)
    for other in (Net(1), Net(0, constant=2.0)):
        save(tmp_path, kind, other.eval())
        assert spec(teacher(tmp_path, body)).model_fingerprint != spec(first).model_fingerprint
    save(tmp_path, kind, Net(0).eval())
    assert spec(teacher(tmp_path, body)).model_fingerprint == spec(first).model_fingerprint


def test_other_code_of_a_program_is_another_teacher(tmp_path: Path) -> None:
    class Doubled(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            patch = self.dropout(self.norm(self.convolution(x))) * self.constant
            return {"global": 2 * patch.mean((2, 3)), "patch": patch}

    for kind, body in (("scripted", SCRIPT), ("exported", EXPORT)):
        save(tmp_path, kind, Net(0).eval())
        plain = spec(teacher(tmp_path, body))
        save(tmp_path, kind, Doubled(0).eval())
        doubled = spec(teacher(tmp_path, body))
        assert plain.weights_digest == doubled.weights_digest
        assert list_differences(plain, doubled)[0].startswith("extra_digest: expected ")


@pytest.mark.parametrize(("kind", "body"), [("traced", SCRIPT), ("exported", EXPORT)], ids=["traced", "exported"])
@pytest.mark.parametrize("part", ["dropout", "norm"])
def test_a_program_compiled_in_training_mode_is_refused(tmp_path: Path, kind: str, body: str, part: str) -> None:
    net = Net(0).eval()
    getattr(net, part).train()
    net.norm.track_running_stats = part != "norm"
    save(tmp_path, kind, net)
    with pytest.raises(TeacherError, match=r"'t' .* beside another image: .* training mode, .*; call eval\(\) on"):
        teacher(tmp_path, body)


def test_a_program_for_one_size_of_batch_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Net(0).eval(), (torch.zeros(7, 3, 8, 8),)), tmp_path / "net.pt2")
    with pytest.raises(TeacherError, match=r"the forward pass of images \[2, 3, 8, 8\] failed: .*Guard"):
        teacher(tmp_path, EXPORT)


def test_a_program_cannot_be_the_base_of_a_student(tmp_path: Path) -> None:
    for kind, body, found in (
        ("scripted", SCRIPT, "a TorchScript"),
        ("exported", EXPORT.replace("')", "').module()"), "a torch.export"),
    ):
        save(tmp_path, kind, Net(0).eval())
        teacher(tmp_path, body)
        with pytest.raises(ConfigError, match=rf"base\.model: .*found {found} program; students of kind side"):
            from_factory(f"torch:{tmp_path / 'mine.py'}:make", None, 0, "base", CodeLoader(Trust(everything=True)))


SESSION = """
    import onnxruntime

    class Session(nn.Module):
        def __init__(self):
            super().__init__()
            self.session = onnxruntime.InferenceSession(HERE / "net.onnx", providers=["CPUExecutionProvider"])
            self.scale = nn.Parameter(torch.ones(1))
            {files}

        def forward(self, x):
            (patch,) = self.session.run(None, {{"x": x.numpy()}})
            patch = torch.from_numpy(patch) * self.scale
            return {{"global": patch.mean((2, 3)), "patch": patch}}

    def make():
        torch.manual_seed(0)
        return Session()
"""


def save_onnx(path: Path, seed: int) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    tensor, helper = onnx.TensorProto, onnx.helper
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).numpy()
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])
    ends = [[helper.make_tensor_value_info(n, tensor.FLOAT, ["b", c, s, s])] for n, c, s in (("x", 3, 8), ("y", 4, 4))]
    graph = helper.make_graph([node], "net", *ends, [onnx.numpy_helper.from_array(weight, "w")])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


def test_an_onnx_session_names_its_files(tmp_path: Path) -> None:
    save_onnx(tmp_path / "net.onnx", 0)
    with pytest.raises(
        TeacherError, match=r"found session \(InferenceSession\); name the files .*self\.program_files = "
    ):
        teacher(tmp_path, SESSION.format(files=""))
    body = SESSION.format(files="self.program_files = ['net.onnx']")
    first = spec(teacher(tmp_path, body))
    assert spec(teacher(tmp_path, body)) == first
    save_onnx(tmp_path / "net.onnx", 1)
    other = spec(teacher(tmp_path, body))
    assert other.weights_digest == first.weights_digest
    with pytest.raises(Exception, match="extra_digest: expected"):
        check_same(first, other)


FROM_FILES = """
    class Histogram(nn.Module):
        def __init__(self):
            super().__init__()
            self.program_files = {files}

        def forward(self, x):
            return {{"global": x.mean((2, 3)), "patch": x}}

    def make():
        return Histogram()
"""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("['weights.bin', 'missing.bin']", r"program_files: expected a file at .*missing\.bin on .*put this one there"),
        ("'weights.bin'", r"program_files: expected a list of paths, found 'weights\.bin'"),
    ],
)
def test_files_are_where_the_module_says(tmp_path: Path, value: str, message: str) -> None:
    (tmp_path / "weights.bin").write_bytes(b"weights")
    with pytest.raises(TeacherError, match=message):
        teacher(tmp_path, FROM_FILES.format(files=value))


def test_files_and_folders_are_told_by_their_content(tmp_path: Path) -> None:
    inside = tmp_path / "saved" / "variables"
    inside.mkdir(parents=True)
    (inside / "a.bin").write_bytes(b"a")
    body = FROM_FILES.format(files="[HERE / 'saved']")
    first = spec(teacher(tmp_path, body))
    assert first.extra_digest is not None
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    moved = spec(teacher(tmp_path, body.replace("saved", "moved")))
    assert moved.extra_digest == first.extra_digest
    (inside / "a.bin").write_bytes(b"b")
    assert spec(teacher(tmp_path, body)).extra_digest != first.extra_digest


def test_a_module_without_tensors_must_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"expected a module with parameters or buffers, found none; .* or \[\] where"
    ):
        teacher(tmp_path, FROM_FILES.format(files="None"))
    assert spec(teacher(tmp_path, FROM_FILES.format(files="[]"))).extra_digest is None


PLAIN = """
    {top}

    class Plain(nn.Module):
        {kind}

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 2, 2)
            self.register_buffer("steady", torch.ones(4, 1, 1), persistent=False)
            self.alias, self.flat = self.convolution.weight, self.steady[0]
            self.settings, self.classes = {{"name": "plain", "sizes": [1, 2]}}, Path("here")
            {held}

        def forward(self, x):
            patch = self.convolution(x) * self.steady{use}
            return {{"global": patch.mean((2, 3)), "patch": patch}}

    def make():
        made = Plain()
        for each in made.parameters():
            nn.init.ones_(each)
        return made
"""
HELD = {
    "attribute": {"held": "self.scale = torch.full((1,), VALUE)", "use": " * self.scale"},
    "array": {"held": "import numpy; self.scale = numpy.full(1, VALUE, 'f')", "use": " * torch.from_numpy(self.scale)"},
    "list of modules": {
        "held": "self.kept = [nn.Linear(1, 1)]; nn.init.constant_(self.kept[0].weight, VALUE); nn.init.zeros_("
        "self.kept[0].bias)",
        "use": " * self.kept[0].weight[0]",
    },
    "closure": {
        "held": "scale = torch.full((1,), VALUE); self.scaled = lambda x: x * scale",
        "use": " * self.scaled(1)",
    },
    "global": {"top": "SCALE = torch.full((1,), VALUE)", "use": " * SCALE"},
    "class": {"kind": "scale = torch.full((1,), VALUE)", "use": " * self.scale"},
}


def plain(folder: Path, value: float, **parts: str) -> TeacherSpec:
    """The value comes from a file, so that the source is the same."""
    (folder / "value.txt").write_text(str(value))
    given = {"top": "", "kind": "pass", "held": "pass", "use": "", **parts}
    body = PLAIN.format(
        **{key: each.replace("VALUE", "float((HERE / 'value.txt').read_text())") for key, each in given.items()}
    )
    return spec(teacher(folder, body))


@pytest.mark.parametrize("where", HELD)
def test_tensors_in_no_state_dict_are_part_of_a_teacher(tmp_path: Path, where: str) -> None:
    one, two = plain(tmp_path, 1, **HELD[where]), plain(tmp_path, 2, **HELD[where])
    assert (one.source_digest, one.weights_digest) == (two.source_digest, two.weights_digest)
    assert one.extra_digest is not None
    assert one.model_fingerprint != two.model_fingerprint
    assert plain(tmp_path, 1, **HELD[where]) == one
    assert one.model_differences(two) == ["extra_digest"]


def test_an_ordinary_module_is_told_by_its_state_alone(tmp_path: Path) -> None:
    """As earlier releases wrote it down, and a cache of theirs goes on under a teacher that has such tensors."""
    ordinary = plain(tmp_path, 1)
    assert ordinary.extra_digest is None
    assert "extra_digest" not in ordinary.model_dump(mode="json") and "extra_digest" not in ordinary.model_part
    held = plain(tmp_path, 1, **HELD["attribute"])
    earlier = held.model_copy(update={"extra_digest": None})
    check_same(earlier, held)
    assert earlier.model_differences(held) == held.model_differences(earlier) == []


@pytest.mark.parametrize("weights", [None, "file"])
@pytest.mark.parametrize("held", ["self.scale = torch.rand(1)", "self.register_buffer('scale', torch.rand(1), False)"])
def test_random_values_that_no_file_replaces_are_refused(tmp_path: Path, weights: str | None, held: str) -> None:
    options = {}
    if weights is not None:
        torch.save(nn.ModuleDict({"convolution": nn.Conv2d(3, 4, 2, 2)}).state_dict(), tmp_path / "w.pth")
        options = {"weights": str(tmp_path / "w.pth")}
    body = PLAIN.format(top="", kind="pass", held=held, use=" * self.scale")
    with pytest.raises(TeacherError, match=r"weights: expected .*, found .*scale"):
        teacher(tmp_path, body, **options)
