"""transformers models that take no plain images are refused before they run, and the modules of the docs run them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kpu.errors import TeacherError
from pipeline.sections import TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher

transformers = pytest.importorskip("transformers")

DOCS = Path(__file__).parents[3] / "docs" / "teachers.md"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
INPUT = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16}


def make(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    made = {
        "videomae": lambda: transformers.VideoMAEModel(
            transformers.VideoMAEConfig(**SMALL, image_size=64, patch_size=16, num_frames=4)
        ),
        "vjepa2": lambda: transformers.VJEPA2Model(
            transformers.VJEPA2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pred_hidden_size=16,
                pred_num_attention_heads=2, pred_num_hidden_layers=1, crop_size=64, frames_per_clip=4,
            )
        ),
        "naflex": lambda: transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=TEXT, vision_config={**SMALL, "num_patches": 16, "patch_size": 8})
        ),
        "imagegpt": lambda: transformers.ImageGPTModel(
            transformers.ImageGPTConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=65, n_positions=256)
        ),
    }[kind]()  # fmt: skip
    made.eval().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    clusters = (torch.rand(64, 3, generator=generator) * 2 - 1).tolist()
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters}))
    return made


def wrapped(name: str, model: Path, folder: Path) -> FrozenTeacher:
    """The module `name` of the docs, on the model in a folder."""
    code = next(each for each in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if f"# {name}.py" in each)
    source, replaced = re.subn(r'(return \w+)\("[\w./-]+"\)', rf'\1("{model}")', code)
    assert replaced == 1
    (folder / f"{name}.py").write_text(source)
    return build_teacher("t", TeacherConfig.model_validate({"model": f"torch:{folder / name}.py:{name}"}))


@pytest.mark.parametrize(
    ("kind", "taken"),
    [("videomae", "clips of 4 frames"), ("vjepa2", "clips of 4 frames"), ("imagegpt", "input_ids"),
     ("naflex", "pixel_values, pixel_attention_mask, spatial_shapes")],
)  # fmt: skip
def test_a_model_of_other_inputs_is_refused_before_it_runs(
    kind: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(kind, tmp_path)
    monkeypatch.setattr("pipeline.teachers.hf.models.hf_input", lambda *_: pytest.fail("the processor was tried"))
    for override in (None, INPUT):
        with pytest.raises(TeacherError, match=rf"takes pixel_values \[B, 3, H, W\] alone, found one of {taken}; wrap"):
            build_teacher("t", TeacherConfig.model_validate({"model": f"hf:{tmp_path}", "input": override}))


@pytest.mark.parametrize(
    ("kind", "name", "grid"),
    [("videomae", "clip", 4), ("vjepa2", "clip", 4), ("naflex", "naflex", 4), ("imagegpt", "pixels", 16)],
)
def test_the_modules_of_the_docs_give_maps_in_order(kind: str, name: str, grid: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(kind, folder)
    teacher = wrapped(name, folder, tmp_path)
    assert teacher.outputs[1].grid == (grid, grid)
    assert teacher.unproven is None


def test_patches_are_cut_as_the_models_processor_does(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference = make("naflex", folder).vision_model
    teacher = wrapped("naflex", folder, tmp_path)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    inputs = processor(images=[image.permute(2, 0, 1) for image in images], return_tensors="pt")
    with torch.inference_mode():
        expected = reference(**{key: inputs[key] for key in ("pixel_values", "pixel_attention_mask", "spatial_shapes")})
    found = teacher(images)
    torch.testing.assert_close(found["global"], expected.pooler_output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["patch"], expected.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_cvts_class_token_can_be_chosen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": [8, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 4]}
    reference = transformers.CvtModel(transformers.CvtConfig(**sizes)).eval()
    reference.save_pretrained(tmp_path)
    config = {"model": f"hf:{tmp_path}", "input": {**INPUT, "size": 64}, "outputs": ["global"]}
    auto, chosen = (build_teacher("t", TeacherConfig.model_validate({**config, "pool": p})) for p in ("auto", "cls"))
    assert (auto.pooling, chosen.pooling) == ("mean of patches", "class token")
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = reference(pixel_values=chosen._normalise(images))
    torch.testing.assert_close(chosen(images)["global"], expected.cls_token_value[:, 0])
    torch.testing.assert_close(auto(images)["global"], expected.last_hidden_state.mean((2, 3)))
