"""`config.json` of an exported student, and the files beside it."""

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from cache.digests import digest
from cache.errors import ConfigError, CorruptError
from cache.spec import Decoding, InputSpec, TeacherSpec
from cache.strict_json import parse_json_object
from trainer.config import ProjectorConfig, StudentConfig
from trainer.shapes import OutputShape

FORMAT: Final = "kpu-student"
VERSION: Final = 1
CONFIG: Final = "config.json"
STUDENT: Final = "student.safetensors"
BASE: Final = "base.safetensors"


class Description(BaseModel):
    """`config.json`: what `load_student` needs to build the module that the weights belong to.

    `student.model` and `base.model` name Python files by a path in the folder, or by an absolute one elsewhere.
    `inputs` are the outputs of the base that the student reads; `heads` the number of classes by teacher; `matrices`
    the `teacher:output` whose targets were rotated; `decoding` is that of the cache that the export was checked with.
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


def read_description(place: Path) -> Description:
    try:
        document = parse_json_object((place / CONFIG).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{place}: expected a folder of `kpu-train export`, found no {CONFIG} ({error.strerror}); check the path"
        ) from None
    except ValueError as error:
        raise CorruptError(str(place / CONFIG), f"is not JSON ({error})") from None
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise ConfigError(f"{place / CONFIG}: expected {FORMAT} {VERSION}, found {found}; use the KPU that wrote it")
    try:
        return Description.model_validate(document)
    except ValidationError as error:
        raise CorruptError(str(place / CONFIG), f"describes no student ({error})") from None


def read_bytes(place: Path, name: str, description: Description) -> bytes:
    try:
        data = (place / name).read_bytes()
    except OSError as error:
        raise CorruptError(str(place / name), f"cannot be read ({error.strerror})") from None
    if digest(data) != description.digests.get(name):
        raise CorruptError(str(place / name), "is not what was exported")
    return data
