"""Loading an exported student from its folder."""

import warnings
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from kpu.errors import CorruptError
from kpu.torch.weights import RANDOM
from kpu.trust.code import CodeLoader, split_model
from kpu.trust.list import Trust, load_trust
from trainer.export.build import build_exported
from trainer.export.description import BASE, STUDENT, StudentDescription, check_others, read_bytes, read_description
from trainer.export.exported import ExportedStudent
from trainer.students.factories import code_of

_HOW: Final = "pass trust_code=True"


def load_student(folder: str | Path, *, trust_code: bool = False) -> ExportedStudent:
    """Load what `kpu-train export` wrote, on the CPU and in evaluation mode.

    The Python of a `torch:` model, in the folder or where `config.json` names it, is run if the user's list of trusted
    code has it, which one's own exports join, or with `trust_code`.

    Raises:
        ConfigError: there is no exported student, or what it refers to is not there.
        CorruptError: a file is damaged, or was edited.
        MismatchError: the base that it refers to has other weights or other code.
        TrustError: its code may not run.
    """
    return load_exported(Path(folder), load_trust(everything=trust_code, how=_HOW))


def load_exported(place: Path, trust: Trust) -> ExportedStudent:
    """`load_student`, with the code that `trust` allows."""
    description = read_description(place)
    codes = CodeLoader(trust)
    state = _tensors(place, STUDENT, description)
    if sum(tensor.nbytes for tensor in state.values()) < description.least_bytes:
        raise CorruptError(str(place / STUDENT), f"holds less than the {description.least_bytes:,} bytes described")
    models = [_in(place, model, description, codes) for model in (description.base.model, description.student.model)]
    here = description.model_copy(
        update={
            "base": description.base.model_copy(update={"model": models[0]}),
            "student": description.student.model_copy(update={"model": models[1], "weights": RANDOM}),
        }
    )
    weights = None
    if here.bundled and here.student.kind in ("side", "frozen"):
        weights = _tensors(place, BASE, description)
    exported = build_exported(here, place, state, weights, codes)
    check_others(place, description, {BASE, STUDENT} if exported.base is not None else {STUDENT})
    return exported.eval()


def _tensors(place: Path, name: str, description: StudentDescription) -> dict[str, Tensor]:
    data = read_bytes(place, name, description)
    try:
        return load_tensors(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptError(str(place / name), f"holds no tensors ({error})") from None


def _in(place: Path, model: str | None, description: StudentDescription, codes: CodeLoader) -> str | None:
    """A model's name with the path of its Python file made absolute; one in the folder is what was exported.

    Raises:
        ConfigError: there is no such file.
        CorruptError: it was edited, or is neither in the folder nor at an absolute path.
    """
    file, factory = split_model(model) if model is not None and model.startswith("torch:") else ("", "")
    if not file.endswith(".py") or Path(file).is_absolute():
        return model
    if Path(file).name != file:
        raise CorruptError(str(place / "config.json"), f"expected a Python file in the folder, found {file!r}")
    here = f"torch:{(place / file).absolute()}:{factory}"
    code, kept = code_of(here, codes, "student"), description.digests.get(file)
    if kept is None:
        warnings.warn(f"{place / file}: this export keeps no digest of it: changes would not show", stacklevel=4)
    elif code is not None and code.digest != kept:
        raise CorruptError(str(place / file), "is not what was exported; restore it, or export the run again")
    return here
