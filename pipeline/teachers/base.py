"""A frozen teacher: uint8 images in, named float32 features out.

Letters: B images, H and W pixels, C RGB, T tokens, D channels, h and w the grid.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kpu.errors import ConfigError, TeacherError
from kpu.format.teacher import NO_LABEL, CodecSpec, OutputSpec, Pool, ShardFormat, TeacherSpec
from kpu.storage.paths import check_name
from kpu.torch.weights import weights_digest
from pipeline.sections import TeacherConfig
from pipeline.teachers.backbone import Backbone, describe, proportional_grid, reason
from pipeline.teachers.custom.programs import check_rows_alone, freeze
from pipeline.teachers.locality import pictures
from pipeline.teachers.proof import Claims, prove, recall, remember

Precision = Literal["fp32", "bf16", "fp16"]
_REDUCED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PROBE_IMAGES = 2


class FrozenTeacher:
    """A frozen model on a device.

    `outputs` are in stored order. `head` is (weight float32 [classes, D], bias float32 [classes]) of a linear
    classifier on `global`, if there is one. `code` are the places, by digest, of the user's own code that was run.
    """

    def __init__(self, name: str, config: TeacherConfig, backbone: Backbone, device: str) -> None:
        self.name, self.model, self.weights = name, config.model, config.weights
        self.input = backbone.input
        self.device = torch.device(device)
        self.precision: Precision = _choose_precision(config.precision, self.device)
        self.source_digest, self.code = backbone.source_digest, backbone.code
        self.weights_digest, self.extra_digest = weights_digest(backbone.module), backbone.extra_digest
        self._who = describe(name, config)
        self._backbone = backbone
        module = freeze(backbone.module).to(self.device)
        self._layout = _memory_format(module, self.device)
        module.to(memory_format=self._layout)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(self.input.mean, dtype=torch.float32, device=self.device).view(shape)
        self._std = torch.tensor(self.input.std, dtype=torch.float32, device=self.device).view(shape)
        self._features, self._compiled = backbone.features, False
        self.pool: Pool | None = None if config.pool == "auto" else config.pool
        self.unproven: tuple[str, ...] | None = None
        images = torch.from_numpy(pictures(self.input.size))
        probed, head = self._probe(images[:_PROBE_IMAGES])
        self.outputs = tuple(self._describe_output(output, tensor) for output, tensor in probed.items())
        self.pooling = backbone.pooling() if "global" in probed else None
        self.head = self._check_head(head, probed)
        self.no_head = self._why_no_head(probed)
        self.model_args = config.model_args or None
        self.labels = self._check_labels(config)
        self.unproven = self._prove(images, probed, accept=config.unproven == "accept")
        if config.compile:
            self._features, self._compiled = torch.compile(backbone.features), True

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
                tensor = _as_tokens(self._pick(output.name, raw))
                if tensor.shape != (len(images_BHWC), *output.shape):
                    raise TeacherError(
                        f"{self._who}: output {output.name!r}: expected {[len(images_BHWC), *output.shape]} as for the "
                        f"first batch, found {list(tensor.shape)}"
                    )
                result[output.name] = tensor.to(torch.float32).contiguous()
            return result

    def spec(self, codec: CodecSpec, shards: ShardFormat = "zarr") -> TeacherSpec:
        """What the cache records of this teacher, stored with `codec` in shards of this format."""
        return TeacherSpec(
            name=self.name,
            model=self.model,
            weights=self.weights,
            weights_digest=self.weights_digest,
            source_digest=self.source_digest,
            extra_digest=self.extra_digest,
            input=self.input,
            precision=self.precision,
            outputs=self.outputs,
            labels=self.labels,
            has_head=self.head is not None,
            model_args=self.model_args,
            no_head=self.no_head,
            codec=codec,
            format=shards,
            pool=self.pool,
            pooling=self.pooling,
            unproven=self.unproven,
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

    def _forward(self, x_BCHW: Tensor, *, exact: bool = False) -> Any:
        """What the model gives; `exact` is in float32 whatever the precision."""
        try:
            with nullcontext() if exact else self._autocast():
                return self._features(x_BCHW)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"{self._who}: {len(x_BCHW)} images do not fit into the device's memory; use a smaller "
                f"executor.batch_size ({reason(error)})"
            ) from error
        except TeacherError:
            raise
        except Exception as error:
            compiled = "; try compile: false" if self._compiled else ""
            raise TeacherError(
                f"{self._who}: the forward pass of images {list(x_BCHW.shape)} failed{compiled}: {reason(error)}"
            ) from error

    def _probe(self, images_BHWC: Tensor) -> tuple[dict[str, Tensor], nn.Linear | None]:
        """Run two pictures through the model: the wanted outputs as they come, and the head if it holds."""
        with torch.inference_mode():
            x_BCHW = self._normalise(images_BHWC)
            raw = self._forward(x_BCHW)
            if self._backbone.compiled:
                check_rows_alone(self._forward, x_BCHW, self._who)
            if not isinstance(raw, Mapping):
                raise TeacherError(f"{self._who}: expected a dict of named tensors, found {type(raw).__name__}")
            picked = {name: self._pick(name, raw) for name in self._backbone.wanted}
            head = self._backbone.head if "global" in picked else None
            if head is not None and self._backbone.classify is not None:
                with self._autocast():
                    logits = self._backbone.classify(x_BCHW)
                head = head if _agrees(head, picked["global"], logits) else None
        return picked, head

    def _prove(self, images_BHWC: Tensor, probed: Mapping[str, Tensor], *, accept: bool) -> tuple[str, ...] | None:
        """Hold features against the pictures they are of, unless that was done before. Which maps are unproven."""
        maps = {output.name: output.grid for output in self.outputs if output.grid is not None}
        fingerprint = self.spec(CodecSpec()).model_fingerprint
        unproven = recall(fingerprint, maps)
        if unproven is None:
            with torch.inference_mode():
                claims = Claims(
                    maps=maps,
                    stated=partial(self._backbone.stated, self._normalise(images_BHWC[:_PROBE_IMAGES])),
                    own_code=self.model.startswith("torch:"),
                    accepted=accept,
                )
                first = probed if self.precision == "fp32" else None
                unproven = prove(self._who, self._exact, images_BHWC, first, claims)
            if not (accept and unproven):
                remember(fingerprint, unproven)
        return unproven or None

    def _exact(self, images_BHWC: Tensor) -> dict[str, Tensor]:
        raw = self._forward(self._normalise(images_BHWC), exact=True)
        return {name: self._pick(name, raw) for name in self._backbone.wanted}

    def _pick(self, name: str, raw: Mapping[str, Any]) -> Tensor:
        names = self._backbone.wanted[name]
        found = next((raw[key] for key in names if key in raw), None)
        if found is None:
            emitted = ", ".join(map(str, raw)) or "nothing"
            raise TeacherError(f"{self._who}: expected an output {names[0]!r}, found {emitted}; ask for one of these")
        if not isinstance(found, Tensor):
            raise TeacherError(f"{self._who}: output {name!r}: expected a tensor, found {type(found).__name__}")
        return found

    def _describe_output(self, name: str, tensor: Tensor) -> OutputSpec:
        try:
            check_name(f"{self._who}: output", name)
        except ConfigError as error:
            raise TeacherError(str(error)) from None
        expected = "[B, D]" if name == "global" else "[B, D, H, W], or [B, T, D] of a grid with the image's proportions"
        ranks = (2,) if name == "global" else (3, 4)
        fits = tensor.ndim in ranks and len(tensor) == _PROBE_IMAGES and tensor.numel() and tensor.is_floating_point()
        grid: tuple[int, int] | None = None
        if fits and tensor.ndim == 4:
            grid = (tensor.shape[2], tensor.shape[3])
        elif fits and tensor.ndim == 3:
            grid = (1, 1) if tensor.shape[1] == 1 else proportional_grid(tensor.shape[1], self.input.size)
            fits = grid is not None
        if not fits:
            raise TeacherError(
                f"{self._who}: output {name!r}: expected floating point {expected} for B = {_PROBE_IMAGES}, "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        return OutputSpec(name=name, shape=tuple(_as_tokens(tensor).shape[1:]), grid=grid)

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

    def _why_no_head(self, probed: Mapping[str, Tensor]) -> str | None:
        """Why a classifier that the model has is not kept; None if it is, or there is none."""
        if self.head is not None or "global" not in probed:
            return None
        if self._backbone.head is not None:
            return "its classifier, applied to global, does not give the model's own answers"
        return self._backbone.no_head

    def _check_labels(self, config: TeacherConfig) -> tuple[int | str, ...] | None:
        if config.labels is None:
            return None
        if self.head is None:
            why = f" ({self.no_head})" if self.no_head is not None else ""
            raise TeacherError(
                f"{self._who}: labels: expected a linear head on `global` for them, found none{why}; leave labels out"
            )
        classes = len(self.head[0])
        if len(config.labels) != classes:
            raise TeacherError(f"{self._who}: labels: expected {classes}, one a class, found {len(config.labels)}")
        return tuple(NO_LABEL if label is None else label for label in config.labels)


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
    ours = features.float() @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
    if ours.shape != logits.shape:
        return False
    tolerance = 1e-3 if features.dtype == torch.float32 else 5e-2
    return bool((ours - logits).abs().max() <= tolerance * logits.abs().max().clamp_min(1e-6))


def _as_tokens(tensor: Tensor) -> Tensor:
    """[B, D] and [B, T, D] as they are, [B, D, h, w] as [B, T, D]."""
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor
