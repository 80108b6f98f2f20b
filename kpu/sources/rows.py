"""From what a source lists to the rows of the sample table."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from kpu.pixels.views import draw_views
from kpu.records.samples import sample_schema
from kpu.sources import ImageSource


def listed_rows(source: ImageSource, views: int, seed: int) -> Iterator[pa.Table]:
    """The sample table, one record a row: every sample `views` times."""
    schema = sample_schema(source.spec.kind)
    for batch in source.batches():
        samples = pa.Table.from_batches([batch])
        table = samples.take(np.repeat(np.arange(samples.num_rows), views)) if views > 1 else samples
        keys = samples["key"].to_pylist() if views > 1 else [""] * samples.num_rows  # one view needs no draws
        table = table.append_column("view", pa.array(np.tile(np.arange(views, dtype=np.int32), samples.num_rows)))
        table = table.append_column("draws", draw_views(keys, views, seed))
        yield table.select(schema.names).cast(schema)
