"""Rows of the sample table to pixels: each row shows its own image, whichever rows stand beside it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kpu.format.plan import SourceSpec
from kpu.pixels.resize import Geometry
from kpu.pixels.views import draw_views
from kpu.records.samples import sample_schema
from kpu.sources import source_reader
from pipeline.run.reports import Stopwatch
from pipeline.worker.loading import ImageLoader
from tests.support.toys import noise

GEOMETRY = Geometry((8, 8), (8, 8), "bilinear")
VIEWS = 3
NAMES = ("a.png", "b.png", "c.png")


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    """Three images with three views each, in order of rows."""
    for place, name in enumerate(NAMES):
        noise(place, (16, 16)).save(tmp_path / name)
    keys = [name for name in NAMES for _ in range(VIEWS)]
    columns = {
        "key": keys,
        "view": list(range(VIEWS)) * len(NAMES),
        "file": keys,
        "label": [None] * len(keys),
        "draws": draw_views(NAMES, VIEWS, 0),
    }
    schema = sample_schema("folder")
    return pa.table({name: pa.array(column, schema.field(name).type) for name, column in columns.items()}, schema)


def load(root: Path, table: pa.Table) -> np.ndarray:
    reader = source_reader(SourceSpec(kind="folder", root=str(root)))
    with ThreadPoolExecutor(2) as pool:
        batches = list(ImageLoader(reader, pool, 2, 0).batches(table, 4, [GEOMETRY], Stopwatch()))
    assert not any(batch.status.any() for batch in batches)
    return np.concatenate([batch.pixels[GEOMETRY] for batch in batches])


@pytest.mark.parametrize("rows", [range(9), (0, 4, 8), (1, 5), (2, 1, 0), (0, 3, 6), (4, 4, 7), (8,)])
def test_any_rows_are_what_each_is_alone(rows: tuple[int, ...], table: pa.Table, tmp_path: Path) -> None:
    alone = [load(tmp_path, table.slice(row, 1))[0] for row in rows]
    np.testing.assert_array_equal(load(tmp_path, table.take(list(rows))), alone)
