"""What a run keeps of the teachers and the caches that it learns from, so that it is read without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from kpu.errors import CorruptError
from kpu.format.statistics import Statistics, dump_statistics, load_statistics
from kpu.format.teacher import TeacherSpec
from kpu.reading.cache import Cache
from kpu.storage.places import redact
from kpu.util.digests import digest
from trainer.data.corpus import Corpus, TeacherInfo
from trainer.data.shapes import shape_of
from trainer.run.place import HEADS, SOURCES, STATISTICS
from trainer.util.sealed import ADVICE, DIGESTS, digests_in, open_json, read_sealed, seal_json

_KEYS: Final = ("teachers", "seeds", "caches")
_CODE: Final = "code"


class _CacheEntry(BaseModel):
    path: str
    plan: str


class _Document(BaseModel):
    """What of `sources.json` is read as it is; later releases may add to it."""

    teachers: dict[str, Any]
    seeds: dict[str, Annotated[int, Field(ge=0, lt=2**63)]]
    caches: list[_CacheEntry]
    images: list[list[str]] = []
    code: dict[str, str] = {}


def pack_sources(corpus: Corpus, code: Mapping[str, str]) -> dict[str, bytes]:
    """The files to keep, in this order: the last one has digests of the others, and `code`, the student's by model."""
    sources = corpus.sources
    statistics = {f"{name}/{o}": s for name, source in sources.items() for o, s in source.statistics.items()}
    heads: dict[str, npt.NDArray[Any]] = {}
    for name, source in sources.items():
        if source.head is not None:
            heads |= {f"{name}.weight": source.head[0], f"{name}.bias": source.head[1]}
    files = {STATISTICS: dump_statistics(statistics, {}), HEADS: save_arrays(heads)}
    document = {
        "teachers": {name: source.spec.model_dump(mode="json") for name, source in sources.items()},
        "seeds": {name: source.seed for name, source in sources.items()},
        "caches": corpus.fingerprints(),
        "images": [images_of(cache) for cache in corpus.caches],
        **({_CODE: dict(code)} if code else {}),
        DIGESTS: {name: digest(data) for name, data in files.items()},
    }
    return {**files, SOURCES: seal_json(document)}


def open_sources(folder: Path) -> dict[str, Any]:
    """The last of these files.

    Raises:
        CorruptError: it is damaged or missing.
    """
    document, file = open_json(folder / SOURCES, _KEYS), folder / SOURCES
    try:
        _Document.model_validate(document)
    except ValidationError as error:
        raise CorruptError(str(file), f"does not describe the caches ({error}); {ADVICE}") from None
    digests_in(document, file)
    return document


def load_code(folder: Path) -> dict[str, str]:
    """Digests by model of the student's code; runs of older releases kept none.

    Raises:
        CorruptError: the last of these files is damaged or missing.
    """
    found: dict[str, str] = open_sources(folder).get(_CODE, {})
    return found


def load_specs(folder: Path) -> dict[str, TeacherSpec]:
    """The specs of the teachers.

    Raises:
        CorruptError: the last of these files is damaged or missing.
    """
    return _specs(open_sources(folder), folder / SOURCES)


def load_sources(folder: Path) -> dict[str, TeacherInfo]:
    """The teachers, with the statistics of the training.

    Raises:
        CorruptError: a file is damaged or missing.
    """
    document = open_sources(folder)
    digests = document.get(DIGESTS, {})
    statistics_file, heads_file = folder / STATISTICS, folder / HEADS
    statistics, _ = load_statistics(read_sealed(statistics_file, digests.get(STATISTICS)), str(statistics_file))
    try:
        heads = load_arrays(read_sealed(heads_file, digests.get(HEADS)))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptError(str(heads_file), f"holds no heads ({error}); {ADVICE}") from None
    try:
        return {
            name: _source(name, spec, document["seeds"][name], statistics, heads)
            for name, spec in _specs(document, folder / SOURCES).items()
        }
    except (KeyError, ValueError) as error:
        raise CorruptError(str(folder / SOURCES), f"does not fit the files beside it ({error}); {ADVICE}") from None


def images_of(cache: Cache) -> list[str]:
    """Where the images of a cache are, and the digest of what they are called; other caches may be of the same."""
    return [redact(cache.plan.source.root), cache.plan.fingerprint]


def _specs(document: Mapping[str, Any], file: Path) -> dict[str, TeacherSpec]:
    try:
        return {name: TeacherSpec.model_validate(spec) for name, spec in document["teachers"].items()}
    except ValueError as error:
        raise CorruptError(str(file), f"does not describe the teachers ({error}); {ADVICE}") from None


def _source(
    name: str,
    spec: TeacherSpec,
    seed: int,
    statistics: Mapping[str, Statistics],
    heads: Mapping[str, npt.NDArray[np.float32]],
) -> TeacherInfo:
    """A teacher of the document, with its part of the statistics and heads of all."""
    own = {key.partition("/")[2]: value for key, value in statistics.items() if key.partition("/")[0] == name}
    shapes = {output.name: shape_of(output) for output in spec.outputs if output.name in own}
    for output, shape in shapes.items():
        if len(own[output].mean) != shape.channels:
            raise ValueError(f"{name}/{output}: expected statistics of {shape.channels} channels")
    head = (heads[f"{name}.weight"], heads[f"{name}.bias"]) if f"{name}.weight" in heads else None
    if head is not None and (head[0].ndim != 2 or head[1].shape != head[0].shape[:1]):
        raise ValueError(f"{name}: expected a head [C, D] with a bias [C], found {head[0].shape}, {head[1].shape}")
    return TeacherInfo(spec, shapes, own, head, seed)
