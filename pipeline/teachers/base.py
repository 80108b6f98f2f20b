"""A frozen teacher: uint8 images in, named float32 features out.

Letters: B images, H and W pixels, C RGB, T tokens, D channels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cache.errors import ConfigError, TeacherError
from cache.layout import check_name
from cache.spec import CodecSpec, InputSpec, OutputSpec, TeacherSpec
from pipeline.config import InputConfig, TeacherConfig
from pipeline.teachers.weights import weights_digest

Precision = Literal["fp32", "bf16", "fp16"]
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE_IMAGES = 2
_LABEL_OF_NOTHING = -1


@dataclass
class Backbone:
    """A loaded model, before it is frozen and moved to a device.

    `features` maps normalised float32 [B, 3, H, W] to named tensors: [B, D] for `global`, [B, D, h, w] or, where the
    grid is square, [B, T, D] for maps. `wanted` gives, for each output in stored order, the names that `features` may
    use for it. `head` is the linear classifier on `global`; with `classify`, the model's own way from images to
    logits, it is kept only if the two agree.
    """

    module: nn.Module
    features: Callable[[Tensor], Any]
    wanted: dict[str, tuple[str, ...]]
    input: InputSpec
    head: nn.Linear | None = None
    classify: Callable[[Tensor], Any] | None = None
    source_digest: str | None = None
    hints: dict[str, str] = field(default_factory=dict)


def describe(name: str, config: TeacherConfig) -> str:
    """How messages call a teacher."""
    return f"teacher {name!r} ({config.model})"


def reason(error: BaseException) -> str:
    """An unforeseen error of somebody else's code, as a clause of a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def input_spec(own: Mapping[str, Any], override: InputConfig | None, who: str) -> InputSpec:
    """The model's own preprocessing, in timm's keys {input_size, mean, std, interpolation, crop_pct}, overridden.

    Raises:
        TeacherError: a value is missing or malformed.
    """
    values = {theirs: own[ours] for ours, theirs in _TIMM_KEYS.items() if ours in own}
    if "size" in values:
        values["size"] = tuple(values["size"])[-2:]
    if override is not None:
        values |= override.model_dump(exclude_none=True)
    if isinstance(values.get("size"), int):
        values["size"] = (values["size"], values["size"])
    try:
        return InputSpec(**{key: tuple(v) if isinstance(v, list | tuple) else v for key, v in values.items()})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise TeacherError(f"{who}: preprocessing: {wrong}; give it under the teacher's `input`") from None


_TIMM_KEYS = {
    "input_size": "size",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "crop",
}


def resolve_layers(config: TeacherConfig, count: int, who: str) -> tuple[int, ...]:
    """`config.layers` of a model with `count` blocks or stages, counted from 0; negative ones from the end.

    Raises:
        TeacherError: one is no number, is out of range, or stands twice.
    """
    found = []
    for layer in config.layers:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise TeacherError(f"{who}: layers: expected numbers from 0 to {count - 1}, found {layer!r}")
        found.append(layer % count)
    if len(set(found)) != len(found):
        raise TeacherError(f"{who}: layers: expected each once, found {list(config.layers)}")
    return tuple(found)


def map_of_tokens(tokens_BND: Tensor, prefix: int, image: tuple[int, int]) -> Tensor | None:
    """Tokens after `prefix` as a map [B, D, h, w] with the proportions of `image` (H, W); None if they form none."""
    count = tokens_BND.shape[1] - prefix
    if count < 1:
        return None
    height = max(1, round((count * image[0] / image[1]) ** 0.5))
    if count % height:
        return None
    return tokens_BND[:, prefix:].transpose(1, 2).unflatten(2, (height, count // height))


class Teacher:
    """A frozen model on a device.

    `outputs` are in stored order. `head` is (weight float32 [classes, D], bias float32 [classes]) of a linear
    classifier on `global`, where there is one.
    """

    def __init__(self, name: str, config: TeacherConfig, backbone: Backbone, device: str) -> None:
        self.name, self.model, self.weights = name, config.model, config.weights
        self.input = backbone.input
        self.device = torch.device(device)
        self.precision: Precision = _choose_precision(config.precision, self.device)
        self.source_digest = backbone.source_digest
        self.weights_digest = weights_digest(backbone.module)
        self._who = describe(name, config)
        self._backbone = backbone
        module = backbone.module.eval().requires_grad_(False).to(self.device)
        self._layout = _memory_format(module, self.device)
        module.to(memory_format=self._layout)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(self.input.mean, dtype=torch.float32, device=self.device).view(shape)
        self._std = torch.tensor(self.input.std, dtype=torch.float32, device=self.device).view(shape)
        self._features = backbone.features
        probed, head = self._probe()
        self.outputs = tuple(self._describe_output(output, tensor) for output, tensor in probed.items())
        self.head = self._check_head(head, probed)
        self.labels = self._check_labels(config)
        if config.compile:
            self._features = torch.compile(backbone.features)

    def __call__(self, images_BHWC: Tensor) -> dict[str, Tensor]:
        """Features of uint8 [B, H, W, 3] on any device: float32 [B, D] and [B, T, D], contiguous, on the teacher's.

        Raises:
            TeacherError: the images have another size, or the model emits other shapes than at first.
        """
        if images_BHWC.dtype != torch.uint8 or images_BHWC.shape[1:] != (*self.input.size, 3):
            raise TeacherError(
                f"{self._who}: expected uint8 images of {(*self.input.size, 3)}, found {images_BHWC.dtype} of "
                f"{tuple(images_BHWC.shape[1:])}"
            )
        with torch.inference_mode():
            raw = self._forward(self._normalise(images_BHWC))
            result = {}
            for output in self.outputs:
                tensor = self._as_tokens(output.name, self._pick(output.name, raw))
                if tensor.shape != (len(images_BHWC), *output.shape):
                    raise TeacherError(
                        f"{self._who}: output {output.name!r}: expected {[len(images_BHWC), *output.shape]} as for the "
                        f"first batch, found {list(tensor.shape)}"
                    )
                result[output.name] = tensor.to(torch.float32).contiguous()
            return result

    def spec(self, codec: CodecSpec) -> TeacherSpec:
        """What the cache records of this teacher, stored with `codec`."""
        return TeacherSpec(
            name=self.name,
            model=self.model,
            weights=self.weights,
            weights_digest=self.weights_digest,
            source_digest=self.source_digest,
            input=self.input,
            precision=self.precision,
            outputs=self.outputs,
            labels=self.labels,
            has_head=self.head is not None,
            codec=codec,
        )

    def _normalise(self, images_BHWC: Tensor) -> Tensor:
        """(x / 255 - mean) / std in float32, as [B, 3, H, W]."""
        pixels = images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        values = pixels.to(torch.float32, memory_format=self._layout)
        return values.div_(255).sub_(self._mean).div_(self._std)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _REDUCED[self.precision])

    def _forward(self, x_BCHW: Tensor) -> Any:
        try:
            with self._autocast():
                return self._features(x_BCHW)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"{self._who}: {len(x_BCHW)} images do not fit into the device's memory ({reason(error)}); "
                "use a smaller executor.batch_size"
            ) from None

    def _probe(self) -> tuple[dict[str, Tensor], nn.Linear | None]:
        """Run a batch of noise through the model: the wanted outputs as they come, and the head if it holds."""
        size = (_PROBE_IMAGES, *self.input.size, 3)
        noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        with torch.inference_mode():
            x_BCHW = self._normalise(torch.from_numpy(noise))
            try:
                raw = self._forward(x_BCHW)
            except TeacherError:
                raise
            except Exception as error:
                raise TeacherError(
                    f"{self._who}: the forward pass of images {list(x_BCHW.shape)} failed: {reason(error)}"
                ) from error
            if not isinstance(raw, Mapping):
                raise TeacherError(f"{self._who}: expected a dict of named tensors, found {type(raw).__name__}")
            picked = {name: self._pick(name, raw) for name in self._backbone.wanted}
            head = self._backbone.head if "global" in picked else None
            if head is not None and self._backbone.classify is not None:
                with self._autocast():
                    logits = self._backbone.classify(x_BCHW)
                head = head if _agrees(head, picked["global"], logits) else None
        return picked, head

    def _pick(self, name: str, raw: Mapping[str, Any]) -> Tensor:
        names = self._backbone.wanted[name]
        found = next((raw[key] for key in names if key in raw), None)
        if found is None:
            hint = self._backbone.hints.get(name, f"it emits {', '.join(sorted(raw)) or 'nothing'}")
            raise TeacherError(f"{self._who}: has no output {names[0]!r}; {hint}")
        if not isinstance(found, Tensor):
            raise TeacherError(f"{self._who}: output {name!r}: expected a tensor, found {type(found).__name__}")
        return found

    def _as_tokens(self, name: str, tensor: Tensor) -> Tensor:
        """[B, D] as it is, maps as [B, T, D]."""
        if name != "global" and tensor.ndim == 4:
            return tensor.flatten(2).transpose(1, 2)
        return tensor

    def _describe_output(self, name: str, tensor: Tensor) -> OutputSpec:
        try:
            check_name(f"{self._who}: output", name)
        except ConfigError as error:
            raise TeacherError(str(error)) from None
        expected = "[B, D]" if name == "global" else "[B, T, D] with square T or [B, D, H, W]"
        ranks = (2,) if name == "global" else (3, 4)
        fits = tensor.ndim in ranks and len(tensor) == _PROBE_IMAGES and tensor.numel() and tensor.is_floating_point()
        grid: tuple[int, int] | None = None
        if fits and tensor.ndim == 4:
            grid = (tensor.shape[2], tensor.shape[3])
        elif fits and tensor.ndim == 3:
            side = int(tensor.shape[1] ** 0.5 + 0.5)
            grid, fits = (side, side), side * side == tensor.shape[1]
        if not fits:
            raise TeacherError(
                f"{self._who}: output {name!r}: expected floating point {expected} for B = {_PROBE_IMAGES}, "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        return OutputSpec(name=name, shape=tuple(self._as_tokens(name, tensor).shape[1:]), grid=grid)

    def _check_head(self, head: nn.Linear | None, probed: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray] | None:
        if head is None:
            return None
        weight = head.weight.detach().float().cpu().numpy()
        if weight.shape[1] != probed["global"].shape[1]:
            raise TeacherError(
                f"{self._who}: head: expected {probed['global'].shape[1]} inputs, the channels of `global`, found "
                f"{weight.shape[1]}"
            )
        bias = np.zeros(len(weight), np.float32) if head.bias is None else head.bias.detach().float().cpu().numpy()
        return weight, bias

    def _check_labels(self, config: TeacherConfig) -> tuple[int, ...] | None:
        if config.labels is None:
            return None
        if self.head is None:
            raise TeacherError(
                f"{self._who}: labels: expected a linear head on `global` for them, found none; leave labels out"
            )
        classes = len(self.head[0])
        if len(config.labels) != classes:
            raise TeacherError(f"{self._who}: labels: expected {classes}, one a class, found {len(config.labels)}")
        return tuple(_LABEL_OF_NOTHING if label is None else label for label in config.labels)


def _choose_precision(wanted: str, device: torch.device) -> Precision:
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    assert wanted in ("fp32", "bf16", "fp16")
    return wanted  # type: ignore[return-value]


def _memory_format(module: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last for convolutional models on a GPU; a plain transformer has one convolution, its patch embedding."""
    convolutions = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def _agrees(head: nn.Linear, features: Tensor, logits: Any) -> bool:
    """Whether `head` on `features` gives `logits`, within what the precision of `features` allows."""
    if not isinstance(logits, Tensor) or features.ndim != 2 or features.shape[1] != head.in_features:
        return False
    ours = torch.nn.functional.linear(features.float(), head.weight.float(), head.bias)
    if ours.shape != logits.shape:
        return False
    tolerance = 1e-3 if features.dtype == torch.float32 else 5e-2
    return bool((ours - logits).abs().max() <= tolerance * logits.abs().max().clamp_min(1e-6))
