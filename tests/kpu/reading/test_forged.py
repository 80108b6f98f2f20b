"""Files of a cache that lie under honest digests are refused, each by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, save

from kpu import open_cache
from kpu.errors import CorruptError
from kpu.interop.theia.names import parse_splits
from kpu.tools.status import status
from kpu.tools.verify import verify
from tests.support.builders import SmallCache
from tests.support.forging import forge_document, forge_group, reseal

PARQUET = "samples/part-000000.parquet"


def refusals(path: Path) -> set[str]:
    report = verify(path)
    assert not report.ok
    return {f"{problem.file}: {problem.reason}" for problem in report.problems}


def forge_plan(path: Path, **changes: Any) -> None:
    forge_document(path / "plan.json", lambda document: document["plan"].update(changes))
    reseal(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples_digests": []}, "samples_digests: expected 1 files for 20 rows in units of 8, found 0"),
        ({"samples": 0, "samples_digests": []}, "samples: expected a number from 1 to 1099511627776, found 0"),
        ({"samples": 2**50}, "samples: expected a number from 1 to 1099511627776, found 1125899906842624"),
        ({"samples": 2**40}, "samples_digests: expected 2147483648 files"),
        ({"views": -1}, "views: expected a number from 1 to 65536, found -1"),
        ({"unit_rows": 0}, "unit_rows: expected a number from 1 to 1048576, found 0"),
        ({"unit_rows": 2**40}, "unit_rows: expected a number from 1 to 1048576"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"metadata": {}}, "metadata: expected digests of"),
        ({"samples": "many"}, "holds no valid plan"),
    ],
)
def test_numbers_of_a_plan_are_bounded_and_agree(small_cache: SmallCache, changes: dict[str, Any], reason: str) -> None:
    forge_plan(small_cache.path, **changes)
    (found,) = refusals(small_cache.path)
    assert found.startswith(f"plan.json: {reason}")
    for read in (open_cache, status):
        with pytest.raises(CorruptError, match=r"^plan\.json: "):
            read(small_cache.path)


def test_a_plan_of_another_number_of_rows_does_not_fit_its_arrays(small_cache: SmallCache) -> None:
    forge_plan(small_cache.path, samples=24)
    with pytest.raises(CorruptError, match=r"images/digest/zarr\.json: does not fit the plan"):
        open_cache(small_cache.path)
    assert any("images/digest/zarr.json: does not fit" in found for found in refusals(small_cache.path))


def test_image_arrays_have_the_dtypes_of_the_format(small_cache: SmallCache) -> None:
    file = small_cache.path / "images/size/zarr.json"
    file.write_text(file.read_text().replace('"int32"', '"int16"'))
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=r"^images/size/zarr\.json: does not fit the plan"):
        open_cache(small_cache.path)
    assert any(found.startswith("images/size/zarr.json: does not fit") for found in refusals(small_cache.path))


SEALED = (
    "plan.json",
    "teachers/beta/commits/000001.json",
    "teachers/beta/zarr.json",
    "teachers/beta/global/zarr.json",
    "images/digest/zarr.json",
    "images/commits/000000.json",
)


@pytest.mark.parametrize("text", ["NaN", "1e999", r'"\ud800"', "[" * 5000 + "]" * 5000])
@pytest.mark.parametrize("file", SEALED)
def test_json_that_nobody_writes_is_a_problem_of_its_file(small_cache: SmallCache, file: str, text: str) -> None:
    path = small_cache.path / file
    path.write_text(path.read_text().replace("{", f'{{"x": {text}, ', 1))
    reseal(small_cache.path)
    assert any(found.startswith(f"{file}: ") for found in refusals(small_cache.path))


def test_a_key_that_is_given_twice_is_a_problem(small_cache: SmallCache) -> None:
    path = small_cache.path / "teachers/beta/global/zarr.json"
    path.write_text(path.read_text().replace("{", '{"shape": [1], ', 1))
    reseal(small_cache.path)
    assert any("expected each key once, found 'shape' again" in found for found in refusals(small_cache.path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [16, 3, 2]}, "holds no valid spec"),
        ({"shape": [2**40]}, "holds no valid spec"),
        ({"shape": [2**20, 2**20]}, "holds no valid spec"),
        ({"shape": [0]}, "holds no valid spec"),
        ({"grid": [1, 16]}, "holds no valid spec"),
        ({"name": "more"}, "files: expected digests of"),
        ({"name": "layer6.patch"}, "spec.outputs: expected names that differ"),
        ({"shape": [17]}, "does not fit the plan and the spec"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(small_cache: SmallCache, changes: dict[str, Any], reason: str) -> None:
    forge_group(small_cache.path / "teachers/beta/zarr.json", lambda kpu: kpu["spec"]["outputs"][0].update(changes))
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=rf"^teachers/beta/(global/)?zarr\.json: {reason}"):
        open_cache(small_cache.path).read("beta", "global", [0])
    assert any(reason in found for found in refusals(small_cache.path))


@pytest.mark.parametrize("key", ["spec", "files", "model_fingerprint", "encoding_fingerprint"])
@pytest.mark.parametrize("value", [None, [], 3, {"x": 1}])
def test_attributes_of_a_teacher_are_those_of_the_format(small_cache: SmallCache, key: str, value: Any) -> None:
    forge_group(small_cache.path / "teachers/beta/zarr.json", lambda kpu: kpu.update({key: value}))
    with pytest.raises(CorruptError, match=r"^teachers/beta/zarr\.json: "):
        open_cache(small_cache.path).read("beta", "global", [0])
    assert any(found.startswith("teachers/beta/zarr.json: ") for found in refusals(small_cache.path))


def test_a_grid_of_other_channels_is_refused(small_cache: SmallCache) -> None:
    file = small_cache.path / "teachers/beta/global/zarr.json"
    document = json.loads(file.read_bytes())
    for key in ("centre", "scale", "offset"):
        document["attributes"]["kpu"][key] = document["attributes"]["kpu"][key][:1]
    file.write_text(json.dumps(document))
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=r"global/zarr\.json: expected 16 channels"):
        open_cache(small_cache.path).read("beta", "global", [0])


@pytest.mark.parametrize(
    ("file", "tensor", "value", "reason"),
    [
        ("stats", "global.mean", np.zeros(3), r"global.centre: expected finite float64\[3\]"),
        ("stats", "global.variance", -np.ones(8), "global.variance: expected numbers from 0"),
        ("stats", "global.count", np.array(0), "global.count: expected one positive int64"),
        ("stats", "global.mean", None, "has no tensor"),
        ("head", "weight", np.zeros((5, 8), np.float16), "expected a weight float32"),
        ("head", "bias", np.zeros(4, np.float32), "expected a weight float32"),
        ("head", "weight", None, "holds no head"),
    ],
)
def test_tensors_of_a_teacher_have_its_shapes(
    small_cache: SmallCache, file: str, tensor: str, value: Any, reason: str
) -> None:
    path = small_cache.path / f"teachers/alpha/{file}.safetensors"
    raw = path.read_bytes()
    tensors = {**load(raw), tensor: value}
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    path.write_bytes(save({k: v for k, v in tensors.items() if v is not None}, header.get("__metadata__")))
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=rf"^teachers/alpha/{file}.safetensors: {reason}"):
        open_cache(small_cache.path).read("alpha", "global", [0])
    assert any(f"teachers/alpha/{file}.safetensors" in found for found in refusals(small_cache.path))


def column(name: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        return table.set_column(place, field, pa.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.slice(1), "expected 20 rows of .*, found 19"),
        (lambda table: table.drop_columns(["label"]), "expected 20 rows"),
        (
            lambda table: table.set_column(0, "key", pa.array(range(20))),
            "expected 20 .* found 20 of .'key int64'",
        ),
        (column("view", range(20)), "view: expected the numbers from 0 to 0 in turn"),
        (column("draws", [[0.5]] * 20), "draws: expected null or 5 numbers"),
        (column("draws", [[float("nan")] * 5] * 20), "draws: expected null or 5 numbers"),
        (column("file", ["x" * 400_000] * 20), "expected up to 1,048,576 bytes of text"),
        (column("file", [f"{row % 2}{'x' * 400_000}" for row in range(20)]), "expected up to 1,048,576 bytes"),
    ],
)
def test_a_sample_table_of_another_form_is_refused(
    small_cache: SmallCache, change: Callable[[pa.Table], pa.Table], reason: str
) -> None:
    """The last ones are a few kilobytes of file that would become eight megabytes of text."""
    path = small_cache.path / PARQUET
    pq.write_table(change(pq.read_table(path)), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=rf"^{PARQUET}: {reason}"):
        open_cache(small_cache.path).samples.take([0])
    assert any(found.startswith(f"{PARQUET}: ") for found in refusals(small_cache.path))


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", None])
def test_rejects_files_that_are_not_a_sample_table(small_cache: SmallCache, raw: bytes | None) -> None:
    path = small_cache.path / PARQUET
    path.write_bytes(path.read_bytes()[:-300] + b"PAR1" if raw is None else raw)
    reseal(small_cache.path)
    with pytest.raises(CorruptError, match=rf"^{PARQUET}: is not a readable Parquet file"):
        open_cache(small_cache.path).samples.take([0])
    assert any(found.startswith(f"{PARQUET}: is not a readable") for found in refusals(small_cache.path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("masked", -1), ("masked", 9), ("masked", "x"), ("nonfinite", "zz"), ("nonfinite", "0001"), ("nonfinite", 3),
     ("outputs", []), ("outputs", {"global": 1}), ("outputs", {"depth": {"bytes": 1, "fidelity": None}})],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_named_by_status(small_cache: SmallCache, field: str, value: Any) -> None:
    file = "teachers/beta/commits/000001.json"
    forge_document(small_cache.path / file, lambda record: record.update({field: value}))
    with pytest.raises(CorruptError, match=rf"^{file}: is no commit record"):
        status(small_cache.path)


@pytest.mark.parametrize("arrays", [{}, {"status": {"bytes": 1, "seal": "x"}}])
def test_a_record_of_images_names_its_arrays(small_cache: SmallCache, arrays: dict[str, Any]) -> None:
    file = "images/commits/000000.json"
    forge_document(small_cache.path / file, lambda record: record.update(arrays=arrays))
    with pytest.raises(CorruptError, match=rf"{file}: arrays: expected"):
        open_cache(small_cache.path).valid()
    assert any(found.startswith(f"{file}: arrays: expected") for found in refusals(small_cache.path))


@pytest.mark.parametrize(
    "raw", [b'{"train": NaN}', b"[]", rb'{"\ud800": 1}', b'{"a":' * 3000, b'{"a": 1, "a": 2}', b"\xff"]
)
def test_splits_of_a_dataset_are_plain_json(raw: bytes) -> None:
    with pytest.raises(CorruptError, match=r"^splits\.json: is not JSON"):
        parse_splits(raw, "splits.json")


@pytest.mark.parametrize(
    "raw", [b'{"started": NaN}', b"[" * 3000, rb'{"id": "\ud800"}', b"\0", b'{"failed": [{"unit": 1e999}]}']
)
def test_a_run_that_nobody_wrote_is_passed_over(small_cache: SmallCache, raw: bytes) -> None:
    (small_cache.path / "runs").mkdir()
    (small_cache.path / "runs/a.json").write_bytes(raw)
    assert status(small_cache.path).complete
    assert verify(small_cache.path).ok
