"""Students: what is trained to hold what all teachers know."""

from collections.abc import Sequence

from kpu.errors import ConfigError
from kpu.trust.code import CodeLoader
from trainer.sections import StudentConfig
from trainer.students.base import BaseInfo, Student
from trainer.students.frozen import FrozenStudent
from trainer.students.side import SideStudent

__all__ = ["BaseInfo", "Student", "make_student"]


def make_student(
    config: StudentConfig, base: BaseInfo, outputs: Sequence[str], codes: CodeLoader | None = None
) -> Student:
    """The student that a configuration describes.

    Args:
        config: the section `student`.
        base: the base whose standardised outputs are the student's units.
        outputs: `global`, `patch` or both.
        codes: what runs the code of a `torch:` model; by default where the user's list has it.

    Raises:
        ConfigError: a layer, model or weights file is not there, or a key does not go with the kind.
        MismatchError: weights do not fit the model, or its code is another than was recorded.
        TrustError: its code may not run.
    """
    if config.concat and config.kind != "side":
        raise ConfigError(f"student.merge: expected add with kind {config.kind}, found concat; concat goes with side")
    if config.kind == "frozen":
        return FrozenStudent(base, outputs)
    if config.kind == "side":
        return SideStudent(config, base, outputs)
    if config.kind == "parallel":
        from trainer.students.parallel import ParallelStudent  # timm takes seconds to import

        return ParallelStudent(config, base, outputs, codes)
    from trainer.students.full import FullStudent

    return FullStudent(config, base, outputs, codes)
