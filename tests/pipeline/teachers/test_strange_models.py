"""Models that timm and transformers load from a stranger's folder run none of his code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from kpu.errors import ConfigError, TeacherError
from kpu.trust.list import tensors_only
from pipeline.sections import TeacherConfig
from pipeline.teachers import build_teacher
from trainer.students.models import build_model

FORCED, UNFORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def test_a_pickle_in_a_folder_of_timms_is_not_run(marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"state_dict": Evil(marker)}, folder / "pytorch_model.bin")
    values = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "first_conv": "conv1.0",
        "classifier": "fc",
    }
    config = {"architecture": "test_resnet", "num_classes": 10, "num_features": 64, "pretrained_cfg": values}
    (folder / "config.json").write_text(json.dumps(config))
    model = f"timm:local-dir:{folder}"
    with pytest.raises(TeacherError):
        build_teacher("t", TeacherConfig(model=model))
    with pytest.raises(ConfigError):
        build_model(model, None, ("global",))
    assert not marker.exists()


@pytest.mark.parametrize("name", [None, FORCED, UNFORCED])
def test_tensors_only_is_stronger_than_what_a_library_asks_for(
    name: str | None, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older releases of timm ask for."""
    torch.save(Evil(marker), tmp_path / "evil.pth")
    if name is not None:
        monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    with pytest.raises(pickle.UnpicklingError), tensors_only():
        torch.load(tmp_path / "evil.pth", weights_only=False)
    assert os.environ == before
    assert not marker.exists()


def test_code_in_a_folder_of_transformers_is_not_run(marker: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())
    kernel = {"attn_implementation": "stranger/kernel"}
    custom = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
    for changes, said in (
        (kernel, "attn_implementation: expected one of transformers' own"),
        (custom, "Python code that comes with its weights|custom code|evil"),
    ):
        (folder / "config.json").write_text(json.dumps({**own, **changes}))
        with pytest.raises(TeacherError, match=said):
            build_teacher("t", TeacherConfig(model=f"hf:{folder}"))
    assert not marker.exists()
