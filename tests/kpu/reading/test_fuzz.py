"""Whatever a cache of a stranger says under honest digests, every reader ends well or with an error of ours."""

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load, save

from cli.views.show import describe_cache, show_info, show_status, show_verification
from kpu import open_cache
from kpu.errors import KpuError
from kpu.tools.repair import repair
from kpu.tools.status import status
from kpu.tools.verify import verify
from tests.support.builders import SmallCache, tree
from tests.support.forging import forge_document, forge_unit, reseal
from tests.support.hostile import mangle, mangle_bytes

CODECS = ("uniform", "rotated", "fp32", "uniform in tars")


def exercise(path: Path) -> list[str]:
    """Call every reader; the names of those that were content. Errors of other kinds than ours are raised."""
    console = Console(file=io.StringIO(), width=200)
    content = []

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except KpuError as error:
            str(error)
        else:
            content.append(name)

    attempt("verify", lambda: show_verification(console, str(path), verify(path, threads=1), 0))
    attempt("status", lambda: show_status(console, status(path)))
    attempt("repair", lambda: repair(path, dry_run=True))
    attempt("info", lambda: show_info(console, describe_cache(open_cache(path))))
    attempt("samples", lambda: open_cache(path).samples.take([0, 19, 5]).to_pylist())
    attempt("labels", lambda: open_cache(path).samples.to_table(["label"]))
    attempt("valid", lambda: open_cache(path).valid())
    attempt("digests", lambda: open_cache(path).image_digests([0, 9, 19]))
    attempt("heads", lambda: [teacher.head for teacher in open_cache(path).teachers.values()])
    for name in ("alpha", "beta"):
        attempt(f"valid {name}", lambda name=name: open_cache(path).valid(teacher=name))
    for name, output in (("alpha", "global"), ("alpha", "patch"), ("beta", "global"), ("beta", "layer6.patch")):
        attempt(
            f"read {name} {output}",
            lambda name=name, output=output: open_cache(path).read(name, output, slice(None), masked="nan"),
        )
    return content


def check(small: SmallCache, original: dict[str, bytes], done: str) -> None:
    """Exercise a cache that was forged, and restore it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            exercise(small.path)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} after: {done}") from error
    restore(small, original)


def restore(small: SmallCache, original: dict[str, bytes]) -> None:
    """Put every file of the cache back as it was."""
    for file in {*tree(small.path)} - original.keys():
        (small.path / file).unlink()
    for file, raw in original.items():
        (small.path / file).write_bytes(raw)


def forge(small: SmallCache, rng: random.Random) -> str:
    """Change one file of the cache, and every digest that seals it."""
    file = rng.choice([file for file in tree(small.path) if not file.startswith("runs/")])
    path = small.path / file
    kind = rng.random()
    if kind < 0.1:
        path.write_bytes(mangle_bytes(path.read_bytes(), rng))
        done = "bytes changed"
    elif file == "plan.json" or "/commits/" in file:
        notes: list[str] = []
        forge_document(path, lambda document: notes.append(mangle(document, rng)))
        if file == "plan.json" and kind < 0.5:
            return f"{file}: {notes}, records as before"
        done = str(notes)
    elif file.endswith("zarr.json"):
        document = json.loads(path.read_bytes())
        done = mangle(document, rng)
        path.write_bytes(json.dumps(document).encode())
    elif file.endswith(".parquet"):
        done = forge_samples(path, rng)
    elif file.endswith(".safetensors"):
        done = forge_tensors(path, rng)
    else:
        done = forge_chunk(small, file, rng)
    reseal(small.path)
    return f"{file}: {done}"


def forge_samples(path: Path, rng: random.Random) -> str:
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    place, column, kind = table.column_names.index(name), table[name], rng.randrange(8)
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.append_column("more", pa.array(range(len(table))))
    elif kind == 2:
        table = table.slice(0, rng.choice((0, 1, len(table) - 1)))
    elif kind == 3:
        table = table.set_column(
            place, pa.field(name, pa.string()), pa.array([str(value) for value in column.to_pylist()])
        )
    elif kind == 4:
        table = table.set_column(place, table.schema.field(name).with_nullable(True), pa.nulls(len(table), column.type))
    elif kind == 5 and pa.types.is_integer(column.type):
        values = [rng.choice((-(2**31), -1, 2**31 - 1)) for _ in range(len(table))]
        table = table.set_column(place, table.schema.field(name), pa.array(values, column.type))
    elif kind == 5 and pa.types.is_string(column.type):
        values = [rng.choice(("", "a\0b", "../x", "\x1b[2J", "same", "x" * 100_000)) for _ in range(len(table))]
        table = table.set_column(place, table.schema.field(name), pa.array(values))
    elif kind == 5:
        values = [rng.choice(([], [float("nan")] * 5, [2.0] * 5, [0.5] * 4, None)) for _ in range(len(table))]
        table = table.set_column(place, table.schema.field(name), pa.array(values, column.type))
    elif kind == 6:
        table = pa.concat_tables([table, table])
    else:
        path.write_bytes(mangle_bytes(path.read_bytes(), rng))
        return "bytes changed"
    pq.write_table(table, path, row_group_size=rng.choice((1, 3, 8, 100)), compression=rng.choice(("zstd", "none")))
    return f"samples changed ({kind}, {name})"


def forge_tensors(path: Path, rng: random.Random) -> str:
    raw = path.read_bytes()
    tensors = dict(load(raw))
    name, kind = rng.choice(sorted(tensors)), rng.randrange(7)
    value = tensors[name]
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = np.concatenate([value.reshape(-1), value.reshape(-1)])
    elif kind == 2:
        tensors[name] = np.asarray(value.astype(rng.choice(("int8", "float16", "uint64", "bool"))))
    elif kind == 3:
        odd = (float("nan"), float("inf"), -1, 0, 1e300) if value.dtype.kind == "f" else (-1, 0)
        tensors[name] = np.full(value.shape, rng.choice(odd), value.dtype)
    elif kind == 4:
        tensors["../x"] = value
    elif kind == 5:
        tensors[name] = np.zeros((0, *value.shape[1:]), value.dtype)
    else:
        path.write_bytes(mangle_bytes(raw, rng))
        return "bytes changed"
    length = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__")
    path.write_bytes(save(tensors, metadata))
    return f"tensors changed ({kind}, {name})"


def forge_chunk(small: SmallCache, file: str, rng: random.Random) -> str:
    """Change chunks of a Zarr shard; of a tar, bytes under wrong checksums."""
    if file.endswith(".tar"):
        (small.path / file).write_bytes(mangle_bytes((small.path / file).read_bytes(), rng))
        return "bytes changed"
    folder, _, rest = file.partition("/c/")
    unit = int(rest.partition("/")[0])
    if folder.startswith("images/"):
        from kpu.records.plan import image_layouts

        layout = image_layouts(20, 8)[folder.removeprefix("images/")]
    else:
        _, name, output = folder.split("/")
        layout = small.teachers[name].layouts[output]
    forge_unit(small.path, layout, folder, unit, lambda _, body: mangle_bytes(body, rng))
    return "chunks changed"


@pytest.mark.parametrize("codec", CODECS)
def test_an_honest_cache_contents_every_reader(cache_of: Callable[[str], SmallCache], codec: str) -> None:
    """And recomputed digests are those that were there: what is forged below is reached."""
    small = cache_of(codec)
    before = tree(small.path)
    assert len(exercise(small.path)) == 15
    reseal(small.path)
    assert exercise(small.path) and verify(small.path).ok
    changed = [file for file, raw in tree(small.path).items() if raw != before[file]]
    assert all(file.startswith(("plan.json", "teachers/")) or "/commits/" in file for file in changed)


@pytest.mark.parametrize("seed", range(4))
def test_forged_files_end_in_errors_of_ours(cache_of: Callable[[str], SmallCache], seed: int) -> None:
    fuzz(cache_of(CODECS[seed]), seed, 12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(100, 116))
def test_many_forged_files_end_in_errors_of_ours(cache_of: Callable[[str], SmallCache], seed: int) -> None:
    fuzz(cache_of(CODECS[seed % len(CODECS)]), seed, 150)


def fuzz(small: SmallCache, seed: int, rounds: int) -> None:
    rng, original = random.Random(seed), tree(small.path)
    for _ in range(rounds):
        check(small, original, forge(small, rng))
