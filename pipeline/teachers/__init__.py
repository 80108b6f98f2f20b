"""Frozen teachers: from timm, from Hugging Face, or anyone's own code."""

from dataclasses import dataclass, field

from kpu.errors import ConfigError
from kpu.trust.code import CodeLoader, naming
from kpu.trust.list import Trust, load_trust
from pipeline.sections import TeacherConfig
from pipeline.teachers.base import FrozenTeacher
from pipeline.teachers.custom.factory import load_custom, read_source

__all__ = ["FrozenTeacher", "ShippedTeacher", "build_teacher", "load_shipped", "ship"]


@dataclass(frozen=True)
class ShippedTeacher:
    """A teacher's configuration with what a worker elsewhere needs to load it; small and picklable.

    `source` is the content of the Python file that defines a `torch:` model: a worker that lacks the file, or has
    another version of it, imports this. `trust` says whether it may.
    """

    config: TeacherConfig
    source: bytes | None = None
    trust: Trust = field(default_factory=Trust)


def ship(
    config: TeacherConfig, trust: Trust | None = None, recorded: str | None = None, who: str | None = None
) -> ShippedTeacher:
    """Pack a teacher for a worker.

    Args:
        config: the teacher.
        trust: which code may run, where a file names the teacher; None if the user does.
        recorded: the digest that this file says the code has.
        who: how messages call the teacher.

    Raises:
        TeacherError: the file that defines it is not there.
        TrustError: `trust` does not let its code run.
        MismatchError: nor is it the recorded code.
    """
    if not config.model.startswith("torch:"):
        return ShippedTeacher(config)
    code = read_source(config.model)
    if trust is None:
        trust = naming(load_trust(), code)
    CodeLoader(trust).require(code, who or f"teacher {config.model}", recorded)
    return ShippedTeacher(config, code.source if code.is_file else None, trust)


def load_shipped(name: str, shipped: ShippedTeacher, *, device: str = "cpu", seed: int = 0) -> FrozenTeacher:
    """Load, freeze and probe a teacher. `seed` is for `weights: random`.

    Raises:
        TeacherError: it is unknown, does not load, or does not emit what was asked for.
    """
    config = shipped.config
    kind = config.model.partition(":")[0]
    if kind == "torch":
        backbone = load_custom(name, config, shipped.source, shipped.trust, seed)
    elif kind == "timm":
        from pipeline.teachers.timm.models import load_timm  # timm takes seconds to import

        backbone = load_timm(name, config, seed)
    elif kind == "hf":
        from pipeline.teachers.hf.models import load_hf  # so does transformers, and it is optional

        backbone = load_hf(name, config, seed)
    else:
        raise ConfigError(f"teacher {name!r}: model: expected timm:, hf: or torch:, found {config.model!r}")
    return FrozenTeacher(name, config, backbone, device)


def build_teacher(name: str, config: TeacherConfig, *, device: str = "cpu", seed: int = 0) -> FrozenTeacher:
    """`load_shipped` of a teacher that the caller names, and that stays here."""
    return load_shipped(name, ship(config), device=device, seed=seed)
