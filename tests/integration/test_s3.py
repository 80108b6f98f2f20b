"""A cache on an object store: extracted, completed, verified and read over a real S3 protocol."""

from pathlib import Path

import numpy as np
import yaml

from kpu import open_cache
from kpu.storage.open import open_storage
from kpu.tools.verify import verify
from pipeline.config import load_config
from pipeline.extract import extract


def test_a_cache_on_s3_equals_one_on_disk(config: Path, finished: Path, s3_bucket: str) -> None:
    out = f"{s3_bucket}/digits.kpu"
    values = yaml.safe_load(config.read_text())
    loaded = load_config(config, out=out)
    first = extract(loaded, units=frozenset([0, 3]))
    assert (first.complete, first.remaining_units) == (False, 3)
    assert extract(loaded).complete
    assert verify(out).ok

    remote, local = open_cache(out), open_cache(finished)
    rows = np.flatnonzero(local.valid())[::-3]
    for name in values["teachers"]:
        for output in ("global", "patch"):
            np.testing.assert_array_equal(remote.read(name, output, rows), local.read(name, output, rows))
        record = f"teachers/{name}/commits/000002.json"
        assert open_storage(out).read(record) == (finished / record).read_bytes()
