"""The module of an export, made once its description agrees with the tensors that are there.

What a description says of sizes is first built on torch's `meta` device, which takes no memory, and compared with the
tensors by name, shape and type; then it is built again, for the tensors to be copied in.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Final

import numpy as np
from torch import Tensor

from kpu.errors import CorruptError, MismatchError
from kpu.format.statistics import Statistics
from kpu.trust.code import CodeLoader
from trainer.export.description import BASE, STUDENT, StudentDescription
from trainer.export.exported import BASE_PREFIX, ExportedStudent
from trainer.students import BaseInfo, Student, make_student
from trainer.students.models import BaseModel, build_base
from trainer.students.sketch import Rehearsal, TooLargeError, check_depth, misfits
from trainer.students.weights import load_strictly

Tensors = dict[str, Tensor]
_NAMED: Final = 5
_STUDENT_PREFIX: Final = "student."


def build_exported(
    here: StudentDescription,
    place: Path,
    state: dict[str, Tensor],
    weights: Tensors | None,
    codes: CodeLoader,
) -> ExportedStudent:
    """Build the module of `here` and fill it.

    Args:
        here: the description, with the paths of Python files made absolute.
        place: the folder, for messages.
        state: the tensors of `student.safetensors`.
        weights: those of `base.safetensors`, if it is there.
        codes: what runs the code of a `torch:` model.

    Raises:
        CorruptError: the description is of other tensors than these.
        ConfigError, MismatchError, TrustError: as `make_student` and `build_base`.
    """
    of_student, of_base = Rehearsal(), Rehearsal()
    try:
        _compare(here, place / STUDENT, state, of_student, codes)
        with nullcontext() if _runs_code(here) else of_student.performing(state):
            student = _student(here, codes)
    except TooLargeError as error:
        raise CorruptError(str(place / STUDENT), str(error)) from None
    base = None
    if not student.needs_images:
        try:
            base = _base(here, weights, of_base, codes)
        except TooLargeError as error:
            raise CorruptError(str(place / BASE), str(error)) from None
    exported = ExportedStudent(here, student, base)
    kept = {name: value for name, value in exported.state_dict().items() if name.startswith(BASE_PREFIX)}
    load_strictly(exported, {**state, **kept}, str(place / STUDENT))
    return exported


def _compare(
    here: StudentDescription, file: Path, state: dict[str, Tensor], rehearsal: Rehearsal, codes: CodeLoader
) -> None:
    """Hold what is described against the tensors; of a model that is code only what lies around it."""
    around = _runs_code(here)
    if here.student.kind == "parallel":
        check_depth(here.base.model_args, state)
    with rehearsal.sketching(state):
        if not around:
            try:
                student = _student(here, codes)
            except TooLargeError:
                raise
            except Exception:  # not every model of timm can be built or run without values
                around = True
        if around:
            student = Student({o: here.base_shapes[o] for o in here.outputs})
        sketch = ExportedStudent(here, student, None).own_state()
    if around:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_STUDENT_PREFIX)}
    found = misfits(sketch, state)
    if found:
        raise CorruptError(str(file), f"holds other tensors than config.json describes: {'; '.join(found[:_NAMED])}")


def _student(here: StudentDescription, codes: CodeLoader) -> Student:
    shapes = here.base_shapes
    blank = {o: _blank(shapes[o].channels) for o in shapes if o in here.inputs}
    return make_student(here.student, BaseInfo(here.base, shapes, blank, here.seed), here.outputs, codes)


def _base(here: StudentDescription, weights: Tensors | None, rehearsal: Rehearsal, codes: CodeLoader) -> BaseModel:
    if weights is None or _is_code(here.base.model):
        return build_base(here.base, here.inputs, here.seed, weights, codes)
    check_depth(here.base.model_args, weights)
    with rehearsal.sketching(weights):
        blank = {name: tensor.to("meta") for name, tensor in weights.items()}
        try:
            build_base(here.base, here.inputs, here.seed, blank, codes)
        except (TooLargeError, MismatchError):
            raise
        except Exception:
            pass
    with rehearsal.performing(weights):
        return build_base(here.base, here.inputs, here.seed, weights, codes)


def _runs_code(here: StudentDescription) -> bool:
    """Whether the student is anyone's code, whose sizes are its own and which need not run without values."""
    return here.student.kind in ("parallel", "full") and _is_code(here.student.model or here.base.model)


def _is_code(model: str | None) -> bool:
    return model is not None and model.startswith("torch:")


def _blank(channels: int) -> Statistics:
    """In place of statistics that the weights hold; takes no memory."""
    zeros, ones = (np.broadcast_to(value, channels) for value in (0.0, 1.0))
    return Statistics(1, zeros, zeros, ones, np.zeros((0, 0)))
