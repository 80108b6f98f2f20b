"""A cache's images are found, moved or not, and are those that were extracted; whoever cannot find them hears how."""

from pathlib import Path

import numpy as np
import pytest

from cache import open_cache
from cache.errors import ConfigError, MismatchError, SourceError
from cache.originals import Originals
from tests.cache.builders import key_of
from tests.cache.theia_builders import build_pictured

ROW = 3


def test_images_are_checked_wherever_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images"
    build_pictured(tmp_path / "small.kpu", images)
    cache = open_cache(tmp_path / "small.kpu")
    record, digest = cache.samples.take(np.array([ROW])), cache.image_digests([ROW])[0]
    moved = images.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"--where: expected the folder .*images; set --where to where they are now"):
        Originals(cache, str(images), option="--where")
    originals = Originals(cache, str(moved), option="--where")
    (data,) = originals.read(record)
    assert data == (moved / key_of(ROW)).read_bytes()
    with originals.decode(data, digest, record) as image:
        assert image.size[0] > 0
    (other,) = originals.read(cache.samples.take(np.array([ROW + 1])))
    with pytest.raises(MismatchError, match=rf"{key_of(ROW)}.*found other bytes.*set --where"):
        originals.decode(other, digest, record).__enter__()
    (moved / key_of(ROW)).unlink()
    with pytest.raises(SourceError, match=rf"{key_of(ROW)}.*set --where"):
        originals.read(record)
