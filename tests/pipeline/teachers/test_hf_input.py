"""Preprocessing of Hugging Face teachers: pixels of the model's own image processor, or a refusal with a way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kpu.errors import TeacherError
from kpu.format.teacher import InputSpec
from kpu.pixels.resize import resize_image
from pipeline.sections import InputConfig, TeacherConfig
from pipeline.teachers import FrozenTeacher, build_teacher
from pipeline.teachers.hf.input import hf_input
from pipeline.teachers.hf.processor import study
from pipeline.teachers.hf.trials import pictures

transformers = pytest.importorskip("transformers")

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DO: dict[str, Any] = {"do_normalize": True, "do_resize": True}
NOW: dict[str, Any] = {**DO, "do_rescale": True, "rescale_factor": 0.00392156862745098}
SQUARE = {"height": 224, "width": 224}
KINDS: dict[str, dict[str, Any]] = {  # as they lie on the hub
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", **DO, **HALF, "size": 224},
    "dino": {"feature_extractor_type": "ViTFeatureExtractor", **DO, **IMAGENET, "size": 224, "resample": 3},
    "beit": {"feature_extractor_type": "BeitFeatureExtractor", **DO, **HALF, "size": 224, "resample": 2}
    | {"crop_size": 224, "do_center_crop": False},
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", **DO, **IMAGENET, "size": 256, "resample": 3}
    | {"crop_size": 224, "do_center_crop": True},
    "convnext-224": {"feature_extractor_type": "ConvNextFeatureExtractor", **DO, **IMAGENET, "size": 224, "resample": 3}
    | {"crop_pct": 0.875},
    "convnext-384": {"feature_extractor_type": "ConvNextFeatureExtractor", **DO, **IMAGENET, "size": 384, "resample": 3}
    | {"crop_pct": 0.875},
    "poolformer": {"image_processor_type": "PoolFormerImageProcessor", **NOW, **IMAGENET, "resample": 3}
    | {"crop_pct": 0.9, "crop_size": SQUARE, "do_center_crop": True, "size": {"shortest_edge": 224}},
    "levit": {"image_processor_type": "LevitImageProcessor", **NOW, **IMAGENET, "resample": 3}
    | {"crop_size": SQUARE, "do_center_crop": True, "size": {"shortest_edge": 224}},
    "efficientnet": {"image_processor_type": "EfficientNetImageProcessor", **NOW, "image_mean": IMAGENET["image_mean"]}
    | {"image_std": [0.47853944, 0.4732864, 0.47434163], "include_top": True, "resample": 0, "size": SQUARE}
    | {"rescale_offset": False, "do_center_crop": False, "crop_size": {"height": 289, "width": 289}},
    "align": {"image_processor_type": "EfficientNetImageProcessor", **NOW, **HALF, "resample": 2, "include_top": False}
    | {"rescale_offset": True, "rescale_factor": 0.00784313725490196, "size": {"height": 346, "width": 346}}
    | {"do_center_crop": True, "crop_size": {"height": 289, "width": 289}},
    "mobilevit": {"feature_extractor_type": "MobileViTFeatureExtractor", "do_resize": True, "resample": 2}
    | {"crop_size": {"height": 256, "width": 256}, "do_center_crop": True, "do_flip_channel_order": True}
    | {"size": {"shortest_edge": 288}},
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", **DO, **CLIP, "size": 224, "resample": 3}
    | {"crop_size": 224, "do_center_crop": True},
    "dinov2": {"image_processor_type": "BitImageProcessor", **NOW, **IMAGENET, "size": {"shortest_edge": 256}}
    | {"resample": 3, "do_center_crop": True, "crop_size": SQUARE, "do_convert_rgb": True},
    "siglip": {"image_processor_type": "SiglipImageProcessor", **NOW, **HALF, "size": SQUARE, "resample": 3},
    "dinov3": {"image_processor_type": "DINOv3ViTImageProcessorFast", **NOW, **IMAGENET, "size": SQUARE, "resample": 2}
    | {"do_center_crop": None, "crop_size": None, "default_to_square": True},
    "sam": {
        "image_processor_type": "SamImageProcessor",
        **NOW,
        **IMAGENET,
        "size": {"longest_edge": 512},
        "resample": 2,
    }
    | {"do_pad": True, "pad_size": {"height": 512, "width": 512}},
    "sam2": {"image_processor_type": "Sam2ImageProcessorFast", **NOW, **IMAGENET, "resample": 2}
    | {"size": {"height": 512, "width": 512}},
}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {  # what cannot be followed, and the step that is named
    "detr": (
        {"feature_extractor_type": "DetrFeatureExtractor", **DO, **IMAGENET, "size": 80, "max_size": 133},
        r"size: DetrImageProcessor makes 80 x 118 pixels of an image of 211 x 312, and 132 x 79 pixels of",
    ),
    "donut": (
        {"image_processor_type": "DonutImageProcessor", **NOW, **HALF, "size": {"height": 64, "width": 48}}
        | {"do_pad": True, "do_thumbnail": True, "do_align_long_axis": False, "resample": 2},
        r"padding: DonutImageProcessor makes images of 64 x 48 pixels by a padding that cannot be followed; the",
    ),
    "crop beyond the image": (
        {"image_processor_type": "CLIPImageProcessor", **NOW, **CLIP, "size": {"shortest_edge": 28}, "crop_size": 32},
        r"padding: CLIPImageProcessor makes images of 32 x 32 pixels by a padding that cannot be followed; the nearest",
    ),
    "box filter": (
        {"image_processor_type": "ViTImageProcessor", **NOW, **HALF, "size": {"height": 32, "width": 32}}
        | {"resample": 4},
        r"interpolation: ViTImageProcessor resizes by box; expected one of bilinear, bicubic, lanczos, nearest",
    ),
    "naflex": (
        {"image_processor_type": "Siglip2ImageProcessor", **NOW, **HALF, "patch_size": 16, "max_num_patches": 256},
        r"output: Siglip2ImageProcessor gives pixel_values \[1, 256, 768\], expected one image \[3, H, W\]",
    ),
    "enormous": (
        {"image_processor_type": "ViTImageProcessor", **NOW, **HALF, "size": {"height": 10**6, "width": 10**6}},
        r"output: ViTImageProcessor has size .*1000000.* expected sides of at most 4096 pixels",
    ),
}


def photos() -> list[Image.Image]:
    """Coarse noise with sharp edges, of odd sizes."""
    rng = np.random.default_rng(7)
    found = []
    for width, height in [(333, 222), (203, 355), (641, 427), (91, 61), (499, 121), (224, 224)]:
        coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((width, height), 3)
        pixels = np.array(coarse)
        pixels[height // 3 : height // 2, width // 5 : width // 3] = rng.integers(0, 256, 3)
        pixels[::17] = 255 - pixels[::17]
        found.append(Image.fromarray(pixels))
    return found


def write(folder: Path, processor: dict[str, Any] | None, kind: str = "dinov2") -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def read(folder: Path, **override: Any) -> InputSpec:
    options = {"trust_remote_code": False}
    return hf_input(transformers, str(folder), options, None, InputConfig(**override) if override else None, "t")


def levels_apart(folder: Path, spec: InputSpec) -> float:
    """How far our pixels are from the processor's at most, in grey levels."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    worst = 0.0
    for photo in photos():
        theirs = np.asarray(processor(images=photo, return_tensors="pt")["pixel_values"][0], np.float64)
        ours = (resize_image(photo, spec) / 255 - np.array(spec.mean)) / np.array(spec.std)
        apart = np.abs(ours.transpose(2, 0, 1) - theirs) * np.array(spec.std)[:, None, None] * 255
        worst = max(worst, float(apart.max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_the_processors_own(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, KINDS[kind])
    spec = read(folder)
    on_pillow = kind not in ("dinov3", "sam2")  # torchvision's alone, which rounds otherwise
    exact = on_pillow and spec.crop_mode != "pad"  # with whole grey levels
    assert levels_apart(folder, spec) < (0.01 if exact else 1.001)
    assert spec.crop_rounding == ("floor" if spec.crop_mode == "center" or spec.crop < 1 else "round")


def test_what_processors_do_is_said_in_the_words_of_a_spec(tmp_path: Path) -> None:
    found = {kind: read(write(tmp_path, processor)) for kind, processor in KINDS.items()}
    assert (found["vit"].crop_mode, found["vit"].interpolation) == ("squash", "bilinear")
    assert (found["deit"].size, found["deit"].crop, found["deit"].crop_mode) == ((224, 224), 0.875, "squash")
    assert [found[f"convnext-{size}"].crop_mode for size in (224, 384)] == ["center", "squash"]
    assert (found["levit"].crop, found["poolformer"].crop) == (0.875, 0.9)
    assert found["efficientnet"].std == pytest.approx((0.229, 0.224, 0.225))
    assert (found["align"].mean, found["align"].std) == ((0.75,) * 3, (0.25,) * 3)
    assert (found["mobilevit"].channels, found["mobilevit"].mean) == ("bgr", (0, 0, 0))
    assert (found["sam"].size, found["sam"].crop_mode) == ((512, 512), "pad")
    assert found["clip"].mean == tuple(CLIP["image_mean"])


def test_centre_is_rounded_down_as_transformers_does(tmp_path: Path) -> None:
    folder = write(tmp_path, KINDS["dinov2"])
    spec = read(folder)
    assert spec.crop_rounding == "floor"
    assert levels_apart(folder, spec.model_copy(update={"crop_rounding": "round"})) > 20


@pytest.mark.parametrize("kind", OTHERS)
def test_step_that_cannot_be_followed_is_named_and_the_remedy_loads(tmp_path: Path, kind: str) -> None:
    processor, message = OTHERS[kind]
    folder = save_model(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(TeacherError, match=message) as refusal:
        build(folder)
    remedy = advised(str(refusal.value))
    teacher = build(folder, input=remedy)
    assert teacher(torch.zeros(1, *teacher.input.size, 3, dtype=torch.uint8))["global"].shape == (1, 32)
    given = InputConfig.model_validate(remedy).model_dump(exclude_none=True)
    for key, value in given.items():
        assert getattr(teacher.input, key) == ((value, value) if key == "size" else value)
    assert teacher.input.mean == pytest.approx(processor["image_mean"])
    assert teacher.input.std == pytest.approx(processor["image_std"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_size": {"height": -5, "width": 7}},
        {"size": {"shortest_edge": 0}},
        {"size": {"height": "a", "width": 3}},
        {"size": "large"},
        {"size": 10**12},
        {"image_mean": {"red": 0.5}},
        {"image_std": [0, 0, 0]},
        {"image_std": [0.5, 0.5]},
        {"image_mean": [float("nan")] * 3},
        {"rescale_factor": [0.5, 0.5]},
        {"resample": 10**12},
        {"data_config": {"mean": 1}, "size": None},
    ],
    ids=str,
)
def test_malformed_processor_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(TeacherError, match=r"^t: preprocessing: .*; to choose .* set the teacher's `input: \{size: "):
        read(write(tmp_path, KINDS["clip"] | wrong))


def test_without_a_processor_the_input_must_be_given(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    message = r"image processor: expected preprocessor_config.json in the folder, found none.* `input: \{size: 32, mean"
    with pytest.raises(TeacherError, match=message):
        build(folder)
    with pytest.raises(TeacherError, match=r"`input: \{mean: .*, std: "):
        build(folder, input={"size": 32})
    teacher = build(folder, input={"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]})
    assert teacher.input.crop_rounding == "floor"
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(TeacherError, match=r"image processor: transformers cannot make the model's"):
        build(folder)


def test_processor_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass OwnImageProcessor: pass\n")
    own = {"image_processor_type": "OwnImageProcessor", "auto_map": {"AutoImageProcessor": "own.OwnImageProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**own, **HALF, "size": 32}))
    teacher = build(folder, input={"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3})
    assert teacher.input.size == (32, 32)
    with pytest.raises(
        TeacherError, match=r"image processor: transformers cannot make .* `input: \{size: 32, mean: \[0.5, 0"
    ):
        build(folder)
    assert not ran.exists()


def test_overrides_change_the_processors_own(tmp_path: Path) -> None:
    folder = write(tmp_path, KINDS["dinov2"])
    larger = read(folder, size=518)
    assert (larger.size, larger.crop, larger.crop_mode) == ((518, 518), 0.875, "center")
    assert read(folder, crop=1.0, interpolation="lanczos").interpolation == "lanczos"
    assert read(folder, crop_mode="squash", crop=1.0).crop_rounding == "round"  # which nothing depends on
    assert read(folder, channels="bgr").channels == "bgr"
    with pytest.raises(TeacherError, match=r"preprocessing: expected crop 1 with crop_mode pad, found 0.875; give it"):
        read(folder, crop_mode="pad")
    assert read(folder, crop_mode="pad", crop=1).crop_rounding == "round"
    write(folder, KINDS["vit"])
    assert read(folder, size=384).crop_mode == "squash"
    assert read(folder, crop=0.9).crop_rounding == "floor"


def test_input_of_an_earlier_cache_is_taken_as_it_was(tmp_path: Path) -> None:
    """Such a cache has centres rounded as timm does, and no other word for it; nothing is compared with it."""
    earlier = InputSpec(size=(32, 32), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop=0.9)
    folder = write(tmp_path, OTHERS["donut"][0])
    again = read(folder, **{key: getattr(earlier, key) for key in InputConfig.model_fields})
    assert again == earlier
    assert again.model_dump().keys() == {"size", "mean", "std", "interpolation", "crop", "crop_mode"}


def test_processor_is_run_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, KINDS["vit"] | {"size": 48})
    first = read(folder)
    monkeypatch.setattr("pipeline.teachers.hf.trials.pictures", None)
    assert read(folder) == first


def test_processor_that_does_other_than_its_fields_is_found_out() -> None:
    base = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil

    class Twice(base):  # type: ignore[misc, valid-type]
        def resize(self, image: Any, size: Any, **options: Any) -> Any:
            half = type(size)(height=size.height // 2, width=size.width // 2)
            return super().resize(super().resize(image, half, **options), size, **options)

    class Nearest(base):  # type: ignore[misc, valid-type]
        def resize(self, image: Any, size: Any, **options: Any) -> Any:
            return super().resize(image, size, **options | {"resample": 0})

    class Squared(base):  # type: ignore[misc, valid-type]
        def rescale(self, image: Any, scale: float, **options: Any) -> Any:
            return super().rescale(image, scale, **options) ** 2

    class Gained(base):  # type: ignore[misc, valid-type]
        def rescale(self, image: Any, scale: float, **options: Any) -> Any:
            return super().rescale(image, 2 * scale, **options)

    class PlainlyDown(base):  # type: ignore[misc, valid-type]
        def resize(self, image: Any, size: Any, **options: Any) -> Any:
            down = image.shape[1] > size.height and image.shape[2] > size.width
            return super().resize(image, size, **options | ({"resample": 0} if down else {}))

    class AsItIs(base):  # type: ignore[misc, valid-type]
        def resize(self, image: Any, size: Any, **options: Any) -> Any:
            return image if image.shape[1] < 50 else super().resize(image, size, **options)

    doubt = study(PlainlyDown(size=640)).doubt  # more than most of the fixed images have
    assert doubt is not None
    assert doubt.step == "resizing"
    doubt = study(AsItIs()).doubt
    assert doubt is not None
    assert "and 42 x 53 pixels of an image of 42 x 53; expected one size" in doubt.found
    doubt = study(Twice()).doubt
    assert doubt is not None
    assert doubt.step == "resizing"
    assert "of 255 levels apart" in doubt.found
    assert study(Nearest()).own["interpolation"] == "nearest"
    doubt = study(Squared()).doubt
    assert doubt is not None
    assert "for orange; expected (x / 255 - mean) / std" in doubt.found
    assert doubt.keys == ("size", "mean", "std")
    assert study(Gained()).own["std"] == (0.25, 0.25, 0.25)


def test_fixed_images_tell_roundings_filters_and_cuts_apart() -> None:
    own = InputSpec(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875, crop_rounding="floor")
    others = [{"crop_rounding": "round"}, {"crop": 0.9}, {"crop_mode": "squash"}, {"channels": "bgr"}]
    others += [{"interpolation": each} for each in ("bilinear", "lanczos", "nearest")]
    for size in ((224, 224), (256, 256), (384, 384)):
        one = own.model_copy(update={"size": size})
        for other in others:
            changed = one.model_copy(update=other)
            apart = [resize_image(picture, one).astype(int) - resize_image(picture, changed) for picture in pictures()]
            assert max(int(np.abs(each).max()) for each in apart) > 10, (size, other)


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)).eval().save_pretrained(folder)
    return folder


def build(folder: Path, **options: Any) -> FrozenTeacher:
    return build_teacher("t", TeacherConfig.model_validate({"model": f"hf:{folder}", **options}))


def advised(message: str) -> dict[str, Any]:
    """The values that a message says to set."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(message.rsplit("`input: ", 1)[1].rstrip("`"))
    return found
