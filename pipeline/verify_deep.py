"""`verify --deep`: run the teachers again on a sample of rows and hold the result against what is stored."""

from contextlib import suppress

import numpy as np
from pydantic import ValidationError

from kpu.commit.teacher import check_same
from kpu.errors import KpuError, SourceError
from kpu.format.plan import CropSpec, SourceSpec
from kpu.format.teacher import DEFAULT_STEP, TeacherSpec
from kpu.reading.cache import Cache, open_cache
from kpu.reading.source_images import if_moved, source_at
from kpu.records.runs import latest_run
from kpu.sources import open_source
from kpu.storage import paths
from kpu.storage.open import open_storage
from kpu.storage.places import is_plain, require_plain
from kpu.tools.verify import Problem, VerifyReport
from kpu.trust.list import Trust, load_trust
from pipeline.config import ExtractConfig
from pipeline.recorded import teacher_config
from pipeline.sections import DataConfig
from pipeline.teachers import ShippedTeacher, ship
from pipeline.teachers.backbone import describe
from pipeline.worker.worker import Worker, WorkerSetup

BATCH = 64
_IMAGES = "--images"
RESOLUTION = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}  # from one number to the next, relative


def verify_deep(
    path: str, report: VerifyReport, *, rows: int, seed: int, images: str | None = None, trust: Trust | None = None
) -> tuple[VerifyReport, int]:
    """Add to `report` every sampled row whose features, computed again, differ by more than one grid step.

    At most `rows` rows are sampled; their number is returned too. `images` replaces the root that the cache
    remembers. `trust` says which code may run of what the cache names; by default what the user's list has.

    Images are checked against `images/digest`. Lossless codecs get a tolerance of one default grid step, in channel
    standard deviations, and one step of their number format: another CPU or thread count may round differently.

    Raises:
        ConfigError: there is no folder `images`.
        TrustError: a teacher's code may not run.
        KpuError: the source or a teacher cannot be loaded again.
    """
    cache = open_cache(path)
    problems = list(report.problems)
    source = _source(cache) if images is None else source_at(cache, images, _IMAGES)
    config = _config(cache, path)
    shipped = {name: ship_again(cache.teachers[name].spec, trust) for name in config.teachers}
    worker = Worker(WorkerSetup(config, shipped, source, "verify"), cache.plan.threads)
    try:
        for description in worker.describe():
            existing = cache.teachers[description.spec.name].spec
            check_same(existing, description.spec.model_copy(update={"format": existing.format}))
        picked = _sample(cache, rows, seed)
        for start in range(0, len(picked), BATCH):
            problems += _compare(cache, worker, picked[start : start + BATCH])
    except SourceError as error:
        raise error.with_advice(if_moved(cache, _IMAGES)) from error
    finally:
        worker.close()
    return report.with_problems(problems), len(picked)


def _source(cache: Cache) -> SourceSpec:
    """Where the latest run read the images; where they were planned, if that run does not say or they are not there.

    Raises:
        ConfigError: the cache names another place than a folder or an object store.
    """
    run = latest_run(open_storage(cache.path))
    with suppress(KpuError, ValidationError):
        data = DataConfig.model_validate(run.config.get("data") if run else None)
        named = [data.source] if isinstance(data.source, str) else data.source
        if all(map(is_plain, named)):
            spec = open_source(data).spec
            if spec.kind == cache.plan.source.kind:
                return spec.model_copy(update={"decoding": cache.plan.source.decoding})
    advice = f"set {_IMAGES} to where the images are"
    require_plain(cache.plan.source.root, said_by=f"{cache.path}: {paths.PLAN}", advice=advice)
    return cache.plan.source


def _sample(cache: Cache, rows: int, seed: int) -> np.ndarray:
    """Sorted, distinct row numbers; masked rows are among them, for their images are compared too."""
    chosen = np.random.default_rng(seed).choice(cache.rows, min(rows, cache.rows), replace=False)
    return np.sort(chosen)


def _compare(cache: Cache, worker: Worker, rows: np.ndarray) -> list[Problem]:
    names = list(cache.teachers)
    digests, features = worker.features(names, rows)
    problems = []
    units = rows // cache.plan.unit_rows
    keys = cache.samples.take(rows)["key"].to_pylist()
    for index in np.flatnonzero((digests != cache.image_digests(rows)).any(1)):
        reason = f"the image of {keys[index]!r} is not the one that was extracted"
        problems.append(Problem(f"images/digest/c/{units[index]}/0", int(units[index]), None, reason))
    for name in names:
        teacher = cache.teachers[name]
        usable = np.flatnonzero(cache.valid(rows, teacher=name))
        for output in teacher.outputs:
            steps = _steps_apart(cache, name, output, rows[usable], features[name][output][usable])
            for index in usable[np.flatnonzero(steps > 1)]:
                reason = f"{keys[index]!r}: stored {output} is more than one grid step from the teacher's"
                problems.append(Problem(f"teachers/{name}/{output}", int(units[index]), name, reason))
    return problems


def _steps_apart(cache: Cache, name: str, output: str, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Per row, the largest distance of stored from computed features in grid steps; infinite from NaN and infinity."""
    encoded = cache.read_encoded(name, output, rows)
    teacher = cache.teachers[name]
    grid = teacher.grid(output)
    if grid.on_grid:
        with np.errstate(invalid="ignore"):
            again = grid.encode(features)
        stored, computed = (grid.steps(each).astype(np.int32) for each in (encoded.values, again))
        apart = np.abs(stored - computed)
    else:
        tolerance = DEFAULT_STEP * teacher.statistics[output].std + RESOLUTION[encoded.codec] * np.abs(features)
        with np.errstate(invalid="ignore"):
            apart = np.abs(grid.decode(encoded.values) - features) / tolerance
    apart = np.where(np.isfinite(features), apart, np.inf)
    return apart.reshape(len(rows), -1).max(1) if len(rows) else np.zeros(0)


def _config(cache: Cache, path: str) -> ExtractConfig:
    plan = cache.plan
    return ExtractConfig(
        data=DataConfig(source=plan.source.root),
        out=path,
        views=plan.views,
        crop=plan.crop or CropSpec(),
        seed=plan.seed,
        allow_nonfinite=True,
        teachers={name: teacher_config(teacher.spec) for name, teacher in cache.teachers.items()},
    )


def ship_again(spec: TeacherSpec, trust: Trust | None = None) -> ShippedTeacher:
    """Pack the teacher that a cache describes; its code runs as `trust` says, by default as the user's list does.

    Raises as `ship`.
    """
    config = teacher_config(spec)
    return ship(config, trust or load_trust(), spec.source_digest, describe(spec.name, config))
