"""Training on a feature cache; importing this loads nothing.

from trainer import load_student

student = load_student("exported/")
features = student([image])["global"]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.export.load import load_student

__distribution__ = "kpu"
__all__ = ["load_student"]


def __getattr__(name: str) -> Any:
    if name == "load_student":
        from trainer.export.load import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
