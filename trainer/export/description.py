"""`config.json` of an exported student, and the files beside it, each held against its digest."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kpu.errors import ConfigError, CorruptError
from kpu.format.base import MOST_LENGTH, Length
from kpu.format.plan import Decoding
from kpu.format.teacher import InputSpec, TeacherSpec
from kpu.storage.found import describe_place
from kpu.util.digests import digest, digest_of
from kpu.util.strict_json import parse_json_object
from trainer.data.shapes import OutputShape
from trainer.sections import ProjectorConfig, StudentConfig
from trainer.util.files import digest_file, read_file

FORMAT: Final = "kpu-student"
VERSION: Final = 1
CONFIG: Final = "config.json"
STUDENT: Final = "student.safetensors"
BASE: Final = "base.safetensors"
BASE_CODE: Final = "base_model.py"
STUDENT_CODE: Final = "student_model.py"
_DIGEST: Final = "digest"
_EXPORT_AGAIN: Final = "copy the folder again from where it is whole, or export the run again"


class StudentDescription(BaseModel):
    """`config.json`: what `load_student` needs to build the module that the weights belong to.

    `student.model` and `base.model` name Python files by a path in the folder, or by an absolute one elsewhere.
    `inputs` are the outputs of the base that the student reads; `heads` the number of classes by teacher; `matrices`
    the `teacher:output` whose targets were rotated; `decoding` is that of the cache that the export was checked with.
    `digests` are of all other files but the card, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    version: int = VERSION
    base: TeacherSpec
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    bundled: bool
    student: StudentConfig
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    input: InputSpec
    shapes: dict[str, dict[str, OutputShape]]
    projector: ProjectorConfig
    heads: dict[str, Length]
    matrices: tuple[str, ...]
    digests: dict[str, str] = {}
    decoding: Decoding = Decoding()

    @model_validator(mode="after")
    def _parts_fit(self) -> "StudentDescription":
        known = {output.name for output in self.base.outputs}
        if not known >= set(self.inputs):
            raise ValueError(f"inputs: expected some of {sorted(known)}, found {list(self.inputs)}")
        if not set(self.inputs) >= set(self.outputs):
            raise ValueError(f"outputs: expected some of the inputs {list(self.inputs)}, found {list(self.outputs)}")
        for slot, shape in self._slots.items():
            if not all(1 <= length <= MOST_LENGTH for length in (shape.channels, *(shape.grid or ()))):
                raise ValueError(f"shapes: expected lengths from 1 to {MOST_LENGTH}, found {shape} of {slot}")
        for slot in (*self.matrices, *map(_global_of, self.heads)):
            if slot not in self._slots:
                raise ValueError(f"heads and matrices: expected some of {sorted(self._slots)}, found {slot}")
        return self

    @property
    def least_bytes(self) -> int:
        """Of the tensors that it describes: they must be there before modules of their size are made."""
        slots = self._slots
        projected = sum(self.projector.hidden * shape.channels for shape in slots.values())
        turned = sum(slots[slot].channels ** 2 for slot in self.matrices)
        heads = sum(classes * slots[_global_of(name)].channels for name, classes in self.heads.items())
        return 4 * (projected + turned + heads)

    @property
    def _slots(self) -> dict[str, OutputShape]:
        """By the name that a module of the output has."""
        return {_slot(name, o): shape for name, outputs in self.shapes.items() for o, shape in outputs.items()}

    @property
    def base_shapes(self) -> dict[str, OutputShape]:
        """Of all outputs that the student reads or gives."""
        return {o.name: OutputShape(o.channels, o.grid) for o in self.base.outputs}


def _slot(teacher: str, output: str) -> str:
    return f"{teacher}:{output}".replace(".", "/")


def _global_of(teacher: str) -> str:
    return _slot(teacher, "global")


def dump_description(description: StudentDescription) -> bytes:
    """`config.json`, with a digest of itself."""
    document = json.loads(description.model_dump_json())
    return (json.dumps({**document, _DIGEST: digest_of(document)}, indent=1, ensure_ascii=False) + "\n").encode()


def read_description(place: Path) -> StudentDescription:
    """What `config.json` says. One of an older release, without a digest of itself, is warned of.

    Raises:
        ConfigError: there is none, or it is of another release.
        CorruptError: it is damaged, or was edited.
    """
    try:
        document = parse_json_object(read_file(place / CONFIG))
    except OSError as error:
        raise ConfigError(
            f"{place}: expected a student of `kpu-train export`, found {describe_place(place)}; check the path"
        ) from error
    except ValueError as error:
        raise CorruptError(str(place / CONFIG), f"is not JSON ({error})") from None
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise ConfigError(f"{place / CONFIG}: expected {FORMAT} {VERSION}, found {found}; use the KPU that wrote it")
    kept = document.pop(_DIGEST, None)
    try:
        if kept is not None and kept != digest_of(document):
            raise CorruptError(str(place / CONFIG), f"is not what was exported; {_EXPORT_AGAIN}")
        description = StudentDescription.model_validate(document)
    except ValueError as error:
        raise CorruptError(str(place / CONFIG), f"describes no student ({error})") from None
    foreign = [name for name in description.digests if Path(name).name != name]
    if foreign:
        raise CorruptError(str(place / CONFIG), f"digests: expected names of files beside it, found {foreign[0]!r}")
    if kept is None:
        warnings.warn(
            f"{place / CONFIG}: this export of an older release keeps no digest of it, so that changes would not show",
            stacklevel=3,
        )
    return description


def read_bytes(place: Path, name: str, description: StudentDescription) -> bytes:
    """The content of a file beside `config.json`.

    Raises:
        CorruptError: it is missing, or is not what was exported.
    """
    try:
        data = read_file(place / name)
    except OSError as error:
        raise CorruptError(str(place / name), f"cannot be read ({error.strerror}); {_EXPORT_AGAIN}") from None
    if digest(data) != description.digests.get(name):
        raise CorruptError(str(place / name), f"is not what was exported; {_EXPORT_AGAIN}")
    return data


def check_others(place: Path, description: StudentDescription, read: Collection[str]) -> None:
    """Hold files that loading does not read, such as the program, against their digests; they may have been removed.

    Raises:
        CorruptError: one is not what was exported.
    """
    for name, expected in description.digests.items():
        if name not in read and (place / name).is_file() and _digest_of_file(place / name) != expected:
            raise CorruptError(str(place / name), f"is not what was exported; {_EXPORT_AGAIN}")


def _digest_of_file(path: Path) -> str:
    """Of a file of any length, which is never held whole."""
    try:
        return digest_file(path)
    except OSError as error:
        raise CorruptError(str(path), f"cannot be read ({error.strerror}); {_EXPORT_AGAIN}") from None
