"""A student that is a model trained whole, and how models are built: from timm, or from anyone's own factory.

Letters: B images, N tokens with prefix, T tokens, D channels, H and W the image, h and w the grid.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from pydantic import ValidationError
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from cache.digests import digest
from cache.errors import ConfigError
from cache.spec import InputSpec
from trainer.adapters import tokens_of
from trainer.config import StudentConfig
from trainer.losses import resize_map
from trainer.shapes import Grid, OutputShape
from trainer.students.base import RANDOM, BaseInfo, Student, differences, initialise, load_strictly, read_weights

_MOST_PREFIX_TOKENS = 16


class FullStudent(Student):
    """Any model, trained whole; a linear map and a resize bring its outputs to z' where width or grid differ.

    Raises:
        ConfigError: the model is unknown, or does not give the outputs.
        MismatchError: the weights do not fit it.
    """

    def __init__(self, config: StudentConfig, base: BaseInfo, outputs: Sequence[str]) -> None:
        assert config.model is not None
        model, own = build_model(config.model, config.weights, outputs)
        super().__init__({output: base.shapes[output] for output in outputs}, own)
        self.model = model
        self.given = probe(model, own.size, outputs, config.model)
        self.maps = nn.ModuleDict(
            {
                output: nn.Linear(shape.channels, self.shapes[output].channels)
                for output, shape in self.given.items()
                if shape.channels != self.shapes[output].channels
            }
        )

    def forward(self, base: dict[str, Tensor], images: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002
        """Images [B, 3, H, W] to z'."""
        found = self.model(images)
        result: dict[str, Tensor] = {}
        for output, shape in self.shapes.items():
            z = as_tokens(found[output])
            if output in self.maps:
                z = self.maps[output](z)
            grid = self.given[output].grid
            result[output] = z if grid is None or shape.grid is None else resize_map(z, grid, shape.grid)
        return result


class TimmOutputs(nn.Module):
    """`global` and `patch` of a timm model in one pass: what its classifier sees, and the final map without prefix."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = model
        self.outputs = tuple(outputs)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Normalised images to the wanted ones of `global` [B, D] and `patch` [B, D, h, w]."""
        final = self.model.forward_features(x_BCHW)
        found: dict[str, Tensor] = {}
        if "patch" in self.outputs:
            found["patch"] = self._as_map(final, (x_BCHW.shape[2], x_BCHW.shape[3]))
        if "global" in self.outputs:
            found["global"] = self.model.forward_head(final, pre_logits=True)
        return found

    def _as_map(self, final: Tensor, image: Grid) -> Tensor:
        if final.ndim == 4:
            return final.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else final
        stated = getattr(self.model, "num_prefix_tokens", None)
        for prefix in range(_MOST_PREFIX_TOKENS) if stated is None else (stated,):
            count = final.shape[1] - prefix
            height = max(1, round((max(count, 0) * image[0] / image[1]) ** 0.5))
            width = count // height
            if count > 1 and height * width == count and abs(height * image[1] / image[0] - width) < 1:
                map_BDhw: Tensor = final[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
                return map_BDhw
        raise ConfigError(f"outputs: patch: expected a map from the student's model, found {list(final.shape)}")


def build_model(
    model: str, weights: str | None, outputs: Sequence[str], *, size: Grid | None = None, seed: int | None = None
) -> tuple[nn.Module, InputSpec]:
    """A model that maps normalised images to named outputs, and its own preprocessing.

    Args:
        model: `timm:<model>` or `torch:<file.py or module>:<factory>`.
        weights: a file, `random`, or None for the model's own.
        outputs: what is wanted of it.
        size: the image's (H, W), where it is not to be the model's own.
        seed: with it `random` weights are those of an extraction; else they are the model's own initialisation.

    Raises:
        ConfigError: the model is unknown or cannot be built.
        MismatchError: the weights do not fit it.
    """
    kind, _, rest = model.partition(":")
    if kind == "torch":
        module = _from_factory(rest, weights, seed)
        _set_aside(getattr(module, "head", None))
        return module, _input_of(getattr(module, "data_config", {}), model)
    if kind != "timm":
        raise ConfigError(f"student.model: expected timm:<model> or torch:<file.py>:<factory>, found {model!r}")
    made: Any = _from_timm(rest, weights, seed)
    if size is not None and tuple(resolve_model_data_config(made)["input_size"][-2:]) != size:
        made = _from_timm(rest, weights, seed, size)
    _set_aside(made.get_classifier())
    return TimmOutputs(made, outputs), _input_of(resolve_model_data_config(made), model)


def probe(model: nn.Module, size: Grid, outputs: Sequence[str], name: str) -> dict[str, OutputShape]:
    """Shapes of a model's outputs for images of `size`.

    Raises:
        ConfigError: an output is absent or no feature.
    """
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
        )
    except (KeyError, ValidationError) as error:
        raise ConfigError(
            f"student.model: {model}: expected data_config with input_size, mean and std, found {dict(own)} ({error})"
        ) from None


def _from_timm(name: str, weights: str | None, seed: int | None, size: Grid | None = None) -> nn.Module:
    create = partial(_create_timm, name, size)
    if weights is None:
        return create(pretrained=True)
    if weights == RANDOM:
        return create() if seed is None else initialise(create, f"timm:{name}", seed)
    state: Mapping[str, Tensor] = read_weights(weights)
    model = create(num_classes=0)  # the classifier is of no use to a student
    own = create()
    if differences(own, state):
        convert = getattr(sys.modules[type(own).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            with suppress(Exception):  # it knows other files than this one; what does not fit is reported below
                state = convert(dict(state), own)
    classifier = own.state_dict().keys() - model.state_dict().keys()
    load_strictly(model, {key: value for key, value in state.items() if key not in classifier}, weights)
    return model


def _create_timm(name: str, size: Grid | None, **options: Any) -> nn.Module:
    try:
        if size is not None:
            try:
                model: nn.Module = timm.create_model(name, img_size=size, **options)
                return model
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        model = timm.create_model(name, **options)
    except Exception as error:
        advice = "; give student.weights: a local file, or random" if options.get("pretrained") else ""
        reason = f"{type(error).__name__}: {error}"[:400]
        raise ConfigError(
            f"student.model: expected a model that timm can build, found {name!r} ({reason}){advice}"
        ) from error
    return model


def _from_factory(place: str, weights: str | None, seed: int | None) -> nn.Module:
    path, _, name = place.rpartition(":")
    state = read_weights(weights) if weights is not None and weights != RANDOM else None
    folder = str(Path(path).absolute().parent)
    sys.path.append(folder)  # a file may import its neighbours, also while the factory runs
    try:
        factory: Callable[..., nn.Module] = getattr(_import(path), name)
        takes = "state_dict" in inspect.signature(factory).parameters
        build = partial(factory, state_dict=state) if takes else factory
        module = build() if weights != RANDOM or seed is None else initialise(build, f"torch:{name}", seed)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:400]
        raise ConfigError(
            f"student.model: expected a factory at torch:{place} that gives a module ({reason})"
        ) from error
    finally:
        sys.path.remove(folder)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"student.model: torch:{place}: expected an nn.Module, found {type(module).__name__}")
    if state is not None and weights is not None:
        load_strictly(module, state, weights)
    return module


def _import(path: str) -> ModuleType:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    name = f"kpu_student_{digest(path.encode(), Path(path).read_bytes())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, for one, look there
    spec.loader.exec_module(module)
    return module
