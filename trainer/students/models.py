"""Models that look at images: a student's, and the base as an extraction ran it.

Letters: B images, T tokens, D channels, H and W the image, h and w the grid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from kpu.errors import ConfigError, MismatchError
from kpu.format.teacher import InputSpec, TeacherSpec
from kpu.torch.weights import weights_digest
from kpu.trust.code import CodeLoader
from trainer.data.shapes import OutputShape, TokenGrid, shape_of
from trainer.students.adapters import tokens_of
from trainer.students.factories import data_config, from_factory
from trainer.students.sketch import is_sketch, rehearsed
from trainer.students.timm_models import TimmOutputs, from_timm
from trainer.students.weights import Weights

Args = Mapping[str, Any] | None


def build_model(
    model: str,
    weights: Weights,
    outputs: Sequence[str],
    *,
    size: TokenGrid | None = None,
    seed: int | None = None,
    codes: CodeLoader | None = None,
    recorded: str | None = None,
    args: Args = None,
) -> tuple[nn.Module, InputSpec]:
    """A model that maps normalised images to named outputs, and its own preprocessing.

    Args:
        model: `timm:<model>` or `torch:<file.py or module>:<factory>`.
        weights: a file, tensors by name, `random`, or None for the model's own.
        outputs: what is wanted of it.
        size: the image's (H, W), where it is not to be the model's own.
        seed: with it `random` weights are those of an extraction; else they are the model's own initialisation.
        codes: what runs a `torch:` model's code; by default where the user's list has it.
        recorded: the digest of that code, where it is known.
        args: arguments of a timm model's architecture.

    Raises:
        ConfigError: the model is unknown or cannot be built.
        MismatchError: the weights do not fit it, or its code is another than was recorded.
        TrustError: its code may not run.
    """
    kind, _, rest = model.partition(":")
    if kind == "torch":
        module = from_factory(model, weights, seed, "student", codes or CodeLoader(), recorded)
        _set_aside(getattr(module, "head", None))
        return module, _input_of(data_config(module), model)
    if kind != "timm":
        raise ConfigError(f"student.model: expected timm:<model> or torch:<file.py>:<factory>, found {model!r}")
    made = _timm(rest, weights, seed, size, "student", classifier=False, args=args)
    return TimmOutputs(made, outputs), _input_of(resolve_model_data_config(made), model)


class BaseModel(nn.Module):
    """The frozen base as an extraction ran it, in evaluation mode; `module` has the weights that its digest covers."""

    def __init__(self, module: nn.Module, features: nn.Module, shapes: Mapping[str, OutputShape]) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        # Of a timm model the one holds the other; the state would have every tensor twice.
        self._module = (module,)
        self.features = features
        self.eval().requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The model whose state is that of a weights file."""
        return self._module[0]

    def train(self, mode: bool = True) -> "BaseModel":  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the base's own outputs, float32 [B, D] and [B, T, D]."""
        found = self.features(x_BCHW)
        return {o: as_tokens(found[o] if o in found else found[o.removesuffix(".patch")]).float() for o in self.shapes}


def build_base(
    spec: TeacherSpec, outputs: Sequence[str], seed: int, weights: Weights = None, codes: CodeLoader | None = None
) -> BaseModel:
    """The base that a cache was extracted with.

    Args:
        spec: the base as its cache describes it.
        outputs: which of its outputs are wanted.
        seed: its cache's plan's, with which `random` weights were drawn.
        weights: tensors by name, where they are at hand; else they are read from where the spec says.
        codes: what runs a `torch:` model's code; by default where the user's list has it.

    Raises:
        ConfigError: it cannot be built here, or was imported.
        MismatchError: its code, its weights or the shapes of its outputs are not those of the extraction.
        TrustError: its code may not run.
    """
    kind, _, rest = spec.model.partition(":")
    weights = weights if weights is not None else spec.weights
    shapes = {output.name: shape_of(output) for output in spec.outputs if output.name in outputs}
    size = spec.known_input.size
    if kind == "torch":
        module = from_factory(spec.model, weights, seed, "base", codes or CodeLoader(), spec.source_digest)
        features = module
    elif kind == "timm":
        module = _timm(rest, weights, seed, size, "base", classifier=True, args=spec.model_args)
        features = TimmOutputs(module, outputs)
    else:
        raise ConfigError(
            f"base.model: expected timm:<model> or torch:<file.py>:<factory>, found {spec.model!r}; a base of another "
            "kind cannot be run on images here"
        )
    found = spec.weights_digest if is_sketch(module.state_dict()) else weights_digest(module)
    if found != spec.weights_digest:
        raise MismatchError(
            f"base.weights: {spec.model}: expected the weights that the cache was extracted with (digest "
            f"{spec.weights_digest}), found {found} from {spec.weights or 'the model itself'}; restore them"
        )
    base = BaseModel(module, features, shapes)
    given = probe(features, size, [o for o in outputs if o in ("global", "patch")], spec.model)
    wrong = {output: shape for output, shape in given.items() if shape != shapes[output]}
    if wrong:
        raise MismatchError(f"base.model: {spec.model}: expected the cached outputs {shapes}, found {wrong}")
    return base


def probe(model: nn.Module, size: TokenGrid, outputs: Sequence[str], name: str) -> dict[str, OutputShape]:
    """Shapes of a model's outputs for images of `size`.

    Raises:
        ConfigError: an output is absent or no feature.
    """
    return rehearsed(lambda: _probe(model, size, outputs, name))


def _probe(model: nn.Module, size: TokenGrid, outputs: Sequence[str], name: str) -> dict[str, OutputShape]:
    training = model.training
    with torch.no_grad():
        found = model.eval()(torch.zeros(2, 3, *size))
    model.train(training)
    shapes: dict[str, OutputShape] = {}
    for output in outputs:
        tensor = found.get(output) if isinstance(found, Mapping) else None
        ranks = (2,) if output == "global" else (3, 4)
        if not isinstance(tensor, Tensor) or tensor.ndim not in ranks:
            what = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigError(f"student.model: {name}: expected an output {output!r} of rank {ranks}, found {what}")
        if tensor.ndim == 2:
            shapes[output] = OutputShape(tensor.shape[1])
            continue
        side = round(tensor.shape[1] ** 0.5)
        grid = (tensor.shape[2], tensor.shape[3]) if tensor.ndim == 4 else (side, side)
        if tensor.ndim == 3 and side * side != tensor.shape[1]:
            raise ConfigError(f"student.model: {name}: {output}: expected a square map, found {tensor.shape[1]} tokens")
        shapes[output] = OutputShape(tensor.shape[1] if tensor.ndim == 4 else tensor.shape[2], grid)
    return shapes


def as_tokens(x: Tensor) -> Tensor:
    """[B, D, h, w] as [B, h * w, D]; anything else as it is."""
    return tokens_of(x) if x.ndim == 4 else x


def _timm(
    name: str,
    weights: Weights,
    seed: int | None,
    size: TokenGrid | None,
    section: str,
    *,
    classifier: bool,
    args: Args,
) -> nn.Module:
    """A timm model for images of `size`, which is told only where it is not its own."""
    made: Any = from_timm(name, weights, seed, None, section, classifier=classifier, args=args)
    if size is not None and tuple(resolve_model_data_config(made)["input_size"][-2:]) != size:
        made = from_timm(name, weights, seed, size, section, classifier=classifier, args=args)
    _set_aside(made.get_classifier())
    found: nn.Module = made
    return found


def _set_aside(classifier: Any) -> None:
    """A student's classifier gets no gradients, which distributed training would wait for."""
    if isinstance(classifier, nn.Module):
        classifier.requires_grad_(False)


def _input_of(own: Mapping[str, Any], model: str) -> InputSpec:
    try:
        return InputSpec(
            size=tuple(own["input_size"][-2:]),
            mean=own["mean"],
            std=own["std"],
            interpolation=own.get("interpolation", "bicubic"),
            crop=own.get("crop_pct", 1.0),
            crop_mode=own.get("crop_mode", "center"),
            crop_rounding=own.get("crop_rounding", "round"),
            channels=own.get("channels", "rgb"),
        )
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"student.model: {model}: expected data_config with input_size, mean and std, found {dict(own)} ({error})"
        ) from None
