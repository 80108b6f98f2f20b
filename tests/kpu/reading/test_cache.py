import base64
import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, MaskedRowError, MissingUnitError, NotACacheError
from kpu.reading import tensorstore as gathering
from kpu.util.digests import open_document, seal_document
from tests.support.builders import (
    MASKED_ROW,
    NONFINITE_ROW,
    ROWS,
    UNIT_ROWS,
    SmallCache,
    features_of,
    head_of,
    key_of,
    sample_table,
    statistics_of,
    teacher_spec,
    unit_images,
)

CODECS = ["uniform", "rotated", "fp32", "fp16", "bf16"]
ALL = [("alpha", "global"), ("alpha", "patch"), ("beta", "global"), ("beta", "layer6.patch")]


@pytest.fixture(autouse=True, params=["own", "tensorstore"])
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for both readers."""
    monkeypatch.setattr(gathering, "FEWEST_CORES", 1 if request.param == "tensorstore" else 10**6)
    monkeypatch.setattr(gathering, "FEWEST_ROWS", 1)


def expected_mask(teacher: str | None) -> np.ndarray:
    valid = np.ones(ROWS, bool)
    valid[MASKED_ROW] = False
    valid[NONFINITE_ROW] = teacher != "alpha"
    return valid


@pytest.mark.parametrize("codec", [*CODECS, *(f"{codec} in tars" for codec in CODECS)])
@pytest.mark.parametrize(("teacher", "output"), ALL)
def test_what_is_read_is_what_the_teacher_gave_within_the_codecs_bound(
    built_cache, codec: str, teacher: str, output: str
) -> None:
    cache = open_cache(built_cache(codec).path)
    codec = codec.removesuffix(" in tars")
    features = features_of(teacher, cache.teachers[teacher].outputs[output])
    valid = expected_mask(teacher)
    values = cache.read(teacher, output, valid)
    assert values.dtype == np.float32
    error = np.abs(values - features[valid]) / cache.teachers[teacher].statistics[output].std
    bound = {"uniform": 0.0251, "rotated": 0.0251, "fp32": 0, "fp16": 2.0**-11, "bf16": 2.0**-8}[codec]
    if codec == "rotated":  # the bound is that of a vector
        error = np.sqrt(np.mean(error**2, axis=-1))
    if codec in ("fp16", "bf16"):
        error /= np.maximum(np.abs(features[valid]) / cache.teachers[teacher].statistics[output].std, 0.01)
    assert error.max() <= bound
    if codec == "uniform":
        assert (values[features[valid] == 0] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("teacher", "output"), ALL)
def test_both_formats_store_the_same(built_cache, codec: str, teacher: str, output: str) -> None:
    one, other = (open_cache(built_cache(name).path) for name in (codec, f"{codec} in tars"))
    rows = np.random.default_rng(0).permutation(ROWS)
    here, there = (cache.read_encoded(teacher, output, rows) for cache in (one, other))
    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.scale, there.scale)
    assert one.plan.digest == other.plan.digest
    assert one.teachers[teacher].published.fingerprint == other.teachers[teacher].published.fingerprint


@pytest.mark.parametrize("codec", CODECS)
def test_webdataset_reads_the_same(built_cache, codec: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = built_cache(f"{codec} in tars").path
    cache = open_cache(path)
    for teacher, output in ALL:
        tars = sorted(map(str, path.glob(f"teachers/{teacher}/{output}/*.tar")))
        stored = cache.read_encoded(teacher, output, slice(None)).values
        rows = []
        for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
            rows.append(int(sample["__key__"]))
            (name,) = [name for name in sample if name.startswith(f"{teacher}.{output}.npy")]
            np.testing.assert_array_equal(sample[name], stored[rows[-1]])
        assert rows == np.flatnonzero(expected_mask(teacher)).tolist()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("teacher", "output"), ALL)
def test_zarr_and_tensorstore_read_the_same(built_cache, codec: str, teacher: str, output: str) -> None:
    path = built_cache(codec).path
    cache = open_cache(path)
    encoded = cache.read_encoded(teacher, output, slice(None))
    array = zarr.open_group(path, mode="r")[f"teachers/{teacher}/{output}"]
    assert array[:].tobytes() == encoded.values.tobytes()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "teachers" / teacher / output)}}
    assert tensorstore.open(spec, read=True).result().read().result().tobytes() == encoded.values.tobytes()

    attributes = array.attrs["kpu"]
    assert (attributes["codec"], attributes["step"]) == (encoded.codec, encoded.step)
    stored = encoded.values
    if codec == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    if codec == "rotated":
        axes = np.frombuffer(base64.b64decode(attributes["axes"]), "<f4").reshape(2 * [stored.shape[-1]])
        stored = ((stored >> 1) ^ -(stored & 1)).astype(np.float32) @ axes
    by_hand = np.float32(attributes["centre"]) + np.float32(attributes["scale"]) * stored.astype(np.float32)
    valid = expected_mask(teacher)
    reach = 1e-5 if codec == "rotated" else 0  # how a product is summed up depends on how many rows there are
    np.testing.assert_allclose(cache.read(teacher, output, valid), by_hand[valid], rtol=reach, atol=reach)


@pytest.mark.filterwarnings("ignore:Object at .* is not recognized")  # files that are no part of the Zarr hierarchy
def test_zarr_lists_every_member(built_cache) -> None:
    group = zarr.open_group(built_cache("uniform").path, mode="r")
    arrays = {name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    wanted = {f"teachers/{teacher}/{output}" for teacher, output in ALL}
    assert arrays == wanted | {"images/digest", "images/status", "images/size"}
    assert group.attrs["kpu"] == {"format": "kpu-cache", "version": 1}
    assert np.array_equal(group["images/digest"][8:16], unit_images(1).digest)
    assert group["images/status"][MASKED_ROW] == 3


def test_rows_are_decoded_into_memory_that_is_given(built_cache) -> None:
    cache = open_cache(built_cache("uniform").path)
    rows = [3, 1, 19]
    expected = cache.read_encoded("alpha", "patch", rows).values
    out = np.zeros_like(expected)
    assert cache.read_encoded("alpha", "patch", rows, out=out).values is out
    np.testing.assert_array_equal(out, expected)
    for wrong in (out[:2], out.astype(np.int32), np.asfortranarray(out)):
        with pytest.raises(ValueError, match=r"^out: expected int16\[3, "):
            cache.read_encoded("alpha", "patch", rows, out=wrong)


def test_a_cache_says_what_it_holds(built_cache) -> None:
    small = built_cache("uniform")
    cache = open_cache(small.path)
    assert (cache.rows, cache.plan, cache.path) == (ROWS, small.plan, str(small.path))
    assert list(cache.teachers) == ["alpha", "beta"]
    alpha = cache.teachers["alpha"]
    assert (alpha.name, alpha.spec) == ("alpha", teacher_spec("alpha"))
    assert list(alpha.outputs) == ["global", "patch"]
    assert alpha.committed().tolist() == [True] * 3
    assert np.array_equal(alpha.statistics["global"].mean, statistics_of(teacher_spec("alpha"))["global"].mean)
    assert np.array_equal(alpha.head[0], head_of(teacher_spec("alpha"))[0])
    assert cache.teachers["beta"].head is None
    assert cache.samples.to_table().equals(sample_table())
    assert np.array_equal(cache.image_digests([8, 15])[1], unit_images(1).digest[7])


def test_rows_come_in_the_order_asked_for_however_they_are_given(built_cache) -> None:
    cache = open_cache(built_cache("uniform").path)
    whole = cache.read("beta", "layer6.patch", slice(None), masked="nan")
    rng = np.random.default_rng(0)
    for rows in (
        [3],
        (19, 0, 8, 8, 3),
        range(2, 20, 5),
        slice(-3, None),
        slice(None, None, -1),
        rng.integers(0, ROWS, 100),
        np.arange(ROWS, dtype=np.uint8),
        rng.random(ROWS) < 0.5,
        [],
    ):
        index = rows if isinstance(rows, slice | np.ndarray) else np.array(rows, dtype=int)
        found = cache.read("beta", "layer6.patch", rows, masked="nan")
        assert np.array_equal(found, whole[index], equal_nan=True)
    assert cache.read("beta", "global", 3).shape == (1, 16)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, ROWS], IndexError, "row 20: the cache has rows 0 to 19"),
        ([-1], IndexError, "row -1"),
        ([0.5], TypeError, "expected integers"),
        ([[1, 2]], TypeError, "one dimension"),
        (np.ones(3, bool), TypeError, "bool"),
        (["a"], TypeError, "expected integers"),
    ],
)
def test_rows_that_are_none_are_refused(built_cache, rows: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_cache(built_cache("uniform").path).read("beta", "global", rows)


def test_unknown_names_are_refused_by_name(built_cache) -> None:
    cache = open_cache(built_cache("uniform").path)
    with pytest.raises(ConfigError, match=r"'gamma': expected one of \['alpha', 'beta'\]"):
        cache.read("gamma", "global", [0])
    with pytest.raises(ConfigError, match=r"\['global', 'patch'\], not 'layer6.patch'"):
        cache.read("alpha", "layer6.patch", [0])
    with pytest.raises(ConfigError, match="'raise' or 'nan'"):
        cache.read("alpha", "global", [0], masked="zero")


@pytest.mark.parametrize("codec", [*CODECS, "uniform in tars", "fp32 in tars"])
def test_masked_rows_raise_or_give_nan(built_cache, codec: str) -> None:
    cache = open_cache(built_cache(codec).path)
    for teacher, output in ALL:
        valid = expected_mask(teacher)
        assert np.array_equal(cache.valid(teacher=teacher), valid)
        values = cache.read(teacher, output, slice(None), masked="nan").reshape(ROWS, -1)
        assert np.isnan(values[~valid]).all()
        assert np.isfinite(values[valid]).all()
        for row in np.flatnonzero(~valid):
            with pytest.raises(MaskedRowError, match=f"row {row} of teacher '{teacher}' is masked"):
                cache.read(teacher, output, [0, row])
    with pytest.raises(MaskedRowError, match="truncated"):
        cache.read("beta", "global", [MASKED_ROW])
    with pytest.raises(MaskedRowError, match="NaN or infinity"):
        cache.read("alpha", "global", [NONFINITE_ROW])
    assert np.array_equal(cache.valid(), expected_mask(None))
    assert cache.valid([MASKED_ROW, 0, MASKED_ROW]).tolist() == [False, True, False]


def test_a_missing_unit_is_an_error_and_found_once_it_is_committed(small_cache: SmallCache) -> None:
    record = small_cache.path / "teachers/alpha/commits/000001.json"
    raw = record.read_bytes()
    record.unlink()
    cache = open_cache(small_cache.path)
    for rows in ([8], [0, 15], slice(None)):
        with pytest.raises(MissingUnitError, match="'alpha' has no committed unit 1"):
            cache.read("alpha", "global", rows, masked="nan")
    with pytest.raises(MissingUnitError):
        cache.valid([8], teacher="alpha")
    assert cache.read("alpha", "global", [0, 19]).shape == (2, 8)
    assert cache.teachers["alpha"].committed().tolist() == [True, False, True]
    record.write_bytes(raw)
    assert cache.read("alpha", "global", [8]).shape == (1, 8)
    (small_cache.path / "images/commits/000002.json").unlink()
    with pytest.raises(MissingUnitError, match="unit 2"):
        cache.valid()


def test_nothing_is_read_where_there_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="found an empty folder"):
        open_cache(tmp_path)
    with pytest.raises(NotACacheError):
        open_cache(tmp_path / "absent")


def every_way(cache_path: Path, teacher: str, output: str, row: int) -> None:
    """Reading `row` alone, with others of its unit, with other units, and as stored, must raise."""
    for rows in ([row], [row - 1, row], [0, row, 19], slice(None)):
        for masked in ("raise", "nan"):
            with pytest.raises(CorruptError):
                open_cache(cache_path).read(teacher, output, rows, masked=masked)
        with pytest.raises(CorruptError):
            open_cache(cache_path).read_encoded(teacher, output, rows)


@pytest.mark.parametrize("codec", ["uniform", "fp32"])
@pytest.mark.parametrize(
    ("output", "shard", "other"),
    [
        ("global", "teachers/beta/global/c/1/0", "teachers/beta/global/c/0/0"),
        ("layer6.patch", "teachers/beta/layer6.patch/c/1/0/0", "teachers/beta/layer6.patch/c/0/0/0"),
    ],
)
def test_a_touched_row_is_never_returned(cache_of, codec: str, output: str, shard: str, other: str) -> None:
    small = cache_of(codec)
    row = 9
    path, elsewhere = small.path / shard, small.path / other
    raw, foreign = path.read_bytes(), elsewhere.read_bytes()
    if codec == "fp32":
        assert len(raw) == len(foreign), "the swap must be of shards of one size, whose indices are equal"
    path.write_bytes(foreign)
    elsewhere.write_bytes(raw)
    every_way(small.path, "beta", output, row)
    elsewhere.write_bytes(foreign)
    for damaged in (raw[:-1], raw + b"\0", b"", raw[1:]):
        path.write_bytes(damaged)
        every_way(small.path, "beta", output, row)
    path.unlink()
    every_way(small.path, "beta", output, row)
    path.write_bytes(raw)
    assert open_cache(small.path).read("beta", output, [row]).shape[0] == 1


@pytest.mark.parametrize("codec", ["uniform", "fp32"])
def test_no_flipped_byte_of_a_shard_gives_other_numbers(cache_of, codec: str) -> None:
    small = cache_of(codec)
    path = small.path / "teachers/beta/layer6.patch/c/1/0/0"
    raw = path.read_bytes()
    truth = open_cache(small.path).read("beta", "layer6.patch", slice(8, 16))
    raised = 0
    for place in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        cache = open_cache(small.path)
        with pytest.raises(CorruptError, match=r"layer6.patch/c/1/0/0"):
            cache.read("beta", "layer6.patch", slice(8, 16))
        for row in range(8, 16):
            try:
                value = cache.read("beta", "layer6.patch", [row])
            except CorruptError:
                raised += 1
            else:
                assert np.array_equal(value[0], truth[row - 8])
    assert raised


def test_damage_after_opening_is_noticed_too(small_cache: SmallCache) -> None:
    cache = open_cache(small_cache.path)
    path = small_cache.path / "teachers/beta/layer6.patch/c/1/0/0"
    cache.read("beta", "layer6.patch", [8])
    with path.open("r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(CorruptError):
        cache.read("beta", "layer6.patch", [8])


@pytest.mark.parametrize(
    "file",
    [
        "teachers/beta/zarr.json",
        "teachers/beta/global/zarr.json",
        "teachers/beta/stats.safetensors",
        "teachers/beta/commits/000000.json",
        "images/commits/000000.json",
        "images/status/c/0",
        "plan.json",
        "zarr.json",
    ],
)
def test_reading_through_a_damaged_file_raises(small_cache: SmallCache, file: str) -> None:
    path = small_cache.path / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError) as error:
        open_cache(small_cache.path).read("beta", "global", [MASKED_ROW - 1])
    assert error.value.file == file


def test_images_of_another_mask_are_noticed(small_cache: SmallCache) -> None:
    file = "teachers/beta/commits/000000.json"
    document = open_document((small_cache.path / file).read_bytes(), file)
    del document["digest"]
    (small_cache.path / file).write_bytes(seal_document({**document, "masked_digest": "00" * 16}))
    with pytest.raises(CorruptError, match="masks other rows"):
        open_cache(small_cache.path).read("beta", "global", [0])


def test_many_threads_read_the_same(built_cache) -> None:
    cache = open_cache(built_cache("uniform").path)
    whole = cache.read("beta", "layer6.patch", slice(None), masked="nan")

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, ROWS, 50)
        found = cache.read("beta", "layer6.patch", rows, masked="nan")
        return np.array_equal(found, whole[rows], equal_nan=True)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_many_caches_share_the_files_that_a_process_may_open(built_cache) -> None:
    caches = [open_cache(built_cache("uniform").path) for _ in range(12)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    read = 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 64, hard))
    try:
        for cache in caches:  # together they have 144 shards
            for name, teacher in cache.teachers.items():
                for output in teacher.outputs:
                    for row in range(0, ROWS, UNIT_ROWS):
                        read += len(cache.read_encoded(name, output, [row]).values)
        held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read == 144
    assert held <= used + 64


def test_an_open_cache_can_be_sent_to_another_process(built_cache) -> None:
    cache = open_cache(built_cache("uniform").path)
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(copy.read("beta", "global", [0, 19]), cache.read("beta", "global", [0, 19]))
    assert copy.samples.take([3])["key"].to_pylist() == [key_of(3)]


def test_damage_names_the_cache_and_what_mends_it(built_cache, tmp_path: Path) -> None:
    path = shutil.copytree(built_cache("uniform").path, tmp_path / "my.kpu")
    shard = next((path / "teachers/alpha/patch/c/0").rglob("*0"))
    data = bytearray((shard if shard.is_file() else shard / "0").read_bytes())
    data[10] ^= 255
    (shard if shard.is_file() else shard / "0").write_bytes(data)
    cache = open_cache(path)
    for read in (cache.read, cache.read_encoded):
        with pytest.raises(CorruptError) as error:
            read("alpha", "patch", [0])
        assert str(error.value).startswith(f"{path}: teachers/alpha/patch/c/0")
        assert f"`kpu-cache repair {path}`, then the extract command" in str(error.value)
        assert (error.value.teacher, error.value.file.startswith("teachers/alpha")) == ("alpha", True)
