"""KPU: inherit many frozen vision models in one student, from a cache of their features.

    import kpu

    kpu.extract("extract.yaml")                          # run the teachers once, and keep their features
    cache = kpu.open_cache("my.kpu")
    features = cache.read("dino", "global", [0, 1, 2])   # float32 [3, D]

    kpu.fit("train.yaml", "runs/first")                  # train a student from the cache
    kpu.evaluate("runs/first")
    kpu.export("runs/first", "exported")
    student = kpu.load_student("exported")

Everything in `__all__` is public. Each name is imported when it is first used: `import kpu` alone loads neither torch
nor Ray, and reading a cache needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kpu.errors import (
        CacheError,
        ConfigError,
        CorruptError,
        FullDiskError,
        IncompleteError,
        KpuError,
        LinkError,
        MaskedRowError,
        MismatchError,
        MissingUnitError,
        NonFiniteError,
        NotACacheError,
        SourceError,
        StorageError,
        StorageFault,
        TeacherError,
        TrainingError,
        TrustError,
    )
    from kpu.reading.cache import Cache, Encoded, open_cache
    from kpu.reading.teachers import CachedTeacher
    from pipeline.extract import extract
    from trainer.evaluation.evaluate import evaluate
    from trainer.export.export import export
    from trainer.export.load import load_student
    from trainer.loop.fit import fit

__version__ = "0.1.0"
__distribution__ = "kpu"
__all__ = [
    "Cache",
    "CacheError",
    "CachedTeacher",
    "ConfigError",
    "CorruptError",
    "Encoded",
    "FullDiskError",
    "IncompleteError",
    "KpuError",
    "LinkError",
    "MaskedRowError",
    "MismatchError",
    "MissingUnitError",
    "NonFiniteError",
    "NotACacheError",
    "SourceError",
    "StorageError",
    "StorageFault",
    "TeacherError",
    "TrainingError",
    "TrustError",
    "__version__",
    "evaluate",
    "export",
    "extract",
    "fit",
    "load_student",
    "open_cache",
]

_MODULES: Final = {
    "Cache": "kpu.reading.cache",
    "Encoded": "kpu.reading.cache",
    "CachedTeacher": "kpu.reading.teachers",
    "open_cache": "kpu.reading.cache",
    "evaluate": "trainer.evaluation.evaluate",
    "export": "trainer.export.export",
    "extract": "pipeline.extract",
    "fit": "trainer.loop.fit",
    "load_student": "trainer.export.load",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kpu' has no attribute {name!r}; expected one of {', '.join(__all__)}")
    module = _MODULES.get(name, "kpu.errors")
    if not module.startswith("kpu."):
        from kpu.own_packages import find_own_packages_first

        find_own_packages_first()
    value = getattr(import_module(module), name)
    globals()[name] = value  # the next use is an ordinary lookup
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
