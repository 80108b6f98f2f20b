"""From a run to the module that its user runs on images: the base rebuilt, statistics and heads copied in."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kpu.format.teacher import TeacherSpec
from kpu.torch.checkpoints import split_entry
from kpu.trust.code import CodeLoader, split_model
from trainer.evaluation.measured import wanted_outputs
from trainer.evaluation.trained import Trained
from trainer.export.description import BASE, BASE_CODE, STUDENT_CODE, StudentDescription
from trainer.export.exported import Affine, ExportedStudent
from trainer.objective.normalize import PhiNormalizer
from trainer.objective.projectors import slot
from trainer.run.checkpoint import pack_tensors
from trainer.students.factories import code_of
from trainer.students.full import FullStudent
from trainer.students.models import build_base
from trainer.students.timm_models import TimmOutputs

TIMM: Final = "timm.safetensors"
BUNDLED_BYTES: Final = 2 * 10**9
"""A base up to this size goes into the folder unless it is said otherwise."""


def assemble(trained: Trained, *, bundle: bool | None) -> tuple[ExportedStudent, dict[str, bytes]]:
    """The module to export, and the files beside its own weights that it needs.

    Raises:
        ConfigError: the base, or a file that defines a model, is not there.
        MismatchError: the base is not the one that the cache was extracted with.
        TrustError: the code of the base may not run.
    """
    config, source = trained.config, trained.sources[trained.config.base]
    student = trained.model.student
    inputs = tuple(wanted_outputs(trained)[config.base])
    base, files, bundled = None, {}, True
    if not student.needs_images:
        base = build_base(source.spec, inputs, source.seed, codes=trained.codes)
        size = sum(tensor.numel() * tensor.element_size() for tensor in base.module.state_dict().values())
        bundled = size < BUNDLED_BYTES if bundle is None else bundle
        if bundled:
            files[BASE] = pack_tensors(base.module.state_dict())
    kept = config.student.model_copy(update={"weights": None})
    spec = source.spec
    if config.student.kind == "parallel":
        kept = kept.model_copy(update={"model": config.student.model or spec.model})
    if bundled:
        if base is not None:
            spec = spec.model_copy(update={"model": _bundle_code(spec.model, BASE_CODE, files, trained.codes)})
        kept = kept.model_copy(update={"model": _bundle_code(kept.model, STUDENT_CODE, files, trained.codes)})
    else:
        spec = _absolute(spec)
    description = StudentDescription(
        base=spec,
        seed=source.seed,
        bundled=bundled,
        student=kept,
        outputs=config.outputs,
        inputs=inputs,
        input=student.input or spec.known_input,
        shapes={name: {o: each.shapes[o] for o in config.outputs} for name, each in trained.sources.items()},
        projector=config.projector,
        heads={
            name: len(each.head[1])
            for name, each in trained.sources.items()
            if each.head is not None and "global" in config.outputs
        },
        matrices=tuple(
            slot(name, o)
            for name in trained.sources
            for o in config.outputs
            if isinstance(trained.model.normalizer(name, o), PhiNormalizer)
        ),
    )
    module = ExportedStudent(description, student, base)
    _fill(module, trained)
    if isinstance(student, FullStudent) and isinstance(student.model, TimmOutputs):
        files[TIMM] = pack_tensors(student.model.model.state_dict())
    return module.eval(), files


def _fill(module: ExportedStudent, trained: Trained) -> None:
    """Copy projectors, statistics and heads of a run into the module; its student is the run's own."""
    module.projectors.load_state_dict(trained.model.projectors.state_dict())
    base = trained.sources[trained.config.base]
    with torch.no_grad():
        for output in module.description.inputs:
            statistics = base.statistics[output]
            module.unit(output).load_state_dict({"scale": _float(statistics.std), "shift": _float(statistics.centre)})
        for name, source in trained.sources.items():
            for output in module.description.outputs:
                affine = module.scales[slot(name, output)]
                assert isinstance(affine, Affine)
                affine.become(trained.model.normalizer(name, output))
            if name in module.description.heads and source.head is not None:
                weight, bias = (_float(part) for part in source.head)
                module.heads[slot(name, "head")].load_state_dict({"weight": weight, "bias": bias})


def _float(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def _bundle_code(model: str | None, name: str, files: dict[str, bytes], codes: CodeLoader) -> Any:
    """`model` with its Python file, if it has one, put beside the weights: the very bytes that were run."""
    code = code_of(model, codes, "student") if model is not None else None
    if code is None or not code.is_file or code.source is None:
        return model
    files[name] = code.source
    return f"torch:{name}:{code.factory}"


def _absolute(spec: TeacherSpec) -> TeacherSpec:
    """A spec that can be followed from any folder."""
    update: dict[str, Any] = {}
    place, factory = split_model(spec.model)
    if spec.model.startswith("torch:") and place.endswith(".py"):
        update["model"] = f"torch:{Path(place).absolute()}:{factory}"
    if spec.weights is not None and Path(split_entry(spec.weights)[0]).is_file():
        update["weights"] = str(Path(spec.weights).absolute())  # an entry behind the path stays there
    return spec.model_copy(update=update)
