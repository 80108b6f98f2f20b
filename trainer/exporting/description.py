"""`config.json` of an exported student, and the files beside it, each held against its digest."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from cache.digests import digest, digest_of
from cache.errors import ConfigError, CorruptError
from cache.spec import Decoding, InputSpec, TeacherSpec
from cache.strict_json import parse_json_object
from trainer.config import ProjectorConfig, StudentConfig
from trainer.files import read_file
from trainer.shapes import OutputShape

FORMAT: Final = "kpu-student"
VERSION: Final = 1
CONFIG: Final = "config.json"
STUDENT: Final = "student.safetensors"
BASE: Final = "base.safetensors"
BASE_CODE: Final = "base_model.py"
STUDENT_CODE: Final = "student_model.py"
_DIGEST: Final = "digest"
_EXPORT_AGAIN: Final = "copy the folder again from where it is whole, or export the run again"


class Description(BaseModel):
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
    seed: int
    bundled: bool
    student: StudentConfig
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    input: InputSpec
    shapes: dict[str, dict[str, OutputShape]]
    projector: ProjectorConfig
    heads: dict[str, int]
    matrices: tuple[str, ...]
    digests: dict[str, str] = {}
    decoding: Decoding = Decoding()

    @property
    def base_shapes(self) -> dict[str, OutputShape]:
        """Of all outputs that the student reads or gives."""
        return {o.name: OutputShape(o.channels, o.grid) for o in self.base.outputs}


def dump_description(description: Description) -> bytes:
    """`config.json`, with a digest of itself."""
    document = json.loads(description.model_dump_json())
    return (json.dumps({**document, _DIGEST: digest_of(document)}, indent=1, ensure_ascii=False) + "\n").encode()


def read_description(place: Path) -> Description:
    """What `config.json` says. One of an older release, without a digest of itself, is warned of.

    Raises:
        ConfigError: there is none, or it is of another release.
        CorruptError: it is damaged, or was edited.
    """
    try:
        document = parse_json_object(read_file(place / CONFIG))
    except OSError as error:
        raise ConfigError(
            f"{place}: expected a folder of `kpu-train export`, found no {CONFIG} ({error.strerror}); check the path"
        ) from None
    except ValueError as error:
        raise CorruptError(str(place / CONFIG), f"is not JSON ({error})") from None
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise ConfigError(f"{place / CONFIG}: expected {FORMAT} {VERSION}, found {found}; use the KPU that wrote it")
    kept = document.pop(_DIGEST, None)
    try:
        if kept is not None and kept != digest_of(document):
            raise CorruptError(str(place / CONFIG), f"is not what was exported; {_EXPORT_AGAIN}")
        description = Description.model_validate(document)
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


def read_bytes(place: Path, name: str, description: Description) -> bytes:
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


def check_others(place: Path, description: Description, read: Collection[str]) -> None:
    """Hold files that loading does not read, such as the program, against their digests; they may have been removed.

    Raises:
        CorruptError: one is not what was exported.
    """
    for name in description.digests:
        if name not in read and (place / name).is_file():
            read_bytes(place, name, description)
