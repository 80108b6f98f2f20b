"""Several caches as one table: rows by teacher and output, standardised alike whatever they are stored as."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kpu import open_cache
from kpu.errors import ConfigError, MismatchError
from tests.support.toys import write_images
from tests.trainer.conftest import BROKEN, IMAGES, RED, Configure, Extract
from trainer.config import validate_config
from trainer.data.corpus import Corpus, HostBatch
from trainer.data.loading import DeviceTransfer
from trainer.data.targets import choose_outputs

OUTPUTS = ("global", "patch")
ALL = {"general": OUTPUTS, "big": OUTPUTS, "shy": OUTPUTS}
CPU = torch.device("cpu")


def open_both(*caches: Path, memory: int = 0, wanted: dict[str, tuple[str, ...]] | None = None) -> Corpus:
    return Corpus([str(cache) for cache in caches], wanted or ALL, "general", memory=memory)


def everything(corpus: Corpus) -> HostBatch:
    return corpus.fetch(np.arange(corpus.rows))


def reference(cache: Path, teacher: str, output: str) -> np.ndarray:
    """(y - centre) / std in float64, 0 in masked rows."""
    opened = open_cache(cache)
    statistics = opened.teachers[teacher].statistics[output]
    values = opened.read(teacher, output, slice(None), masked="nan").astype(np.float64)
    return np.nan_to_num((values - statistics.centre) / statistics.std)


@pytest.fixture(scope="module")
def others(extract: Extract, place: Path) -> Path:
    """Other images, by two of the three teachers, in another step."""
    images = write_images(place / "others", 40)
    return extract("others", "codec.step=0.2", images=images, general="toy", big="wider")


@pytest.mark.parametrize("memory", [0, 500, 2**20])
def test_rows_are_standardised_and_masked_rows_are_zero(toys: Path, memory: int) -> None:
    corpus = open_both(toys, memory=memory)
    for _ in range(2):  # the second time from memory, where there is some
        batch = DeviceTransfer(corpus, CPU)(everything(corpus))
        for teacher in ALL:
            for output in OUTPUTS:
                found = batch.targets[teacher][output]
                assert found.dtype == torch.float32
                np.testing.assert_allclose(found.numpy(), reference(toys, teacher, output), rtol=1e-5, atol=1e-5)
            masked = {BROKEN, RED} if teacher == "shy" else {BROKEN}
            assert set(np.flatnonzero(batch.weights[teacher].numpy() == 0)) == masked


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16"])
def test_every_codec_gives_the_same_targets_within_its_bound(extract: Extract, toys: Path, codec: str) -> None:
    other = extract(codec, f"codec.name={codec}", general="toy", big="wider", shy="poisoned")
    plain, lossless = (DeviceTransfer(corpus := open_both(cache), CPU)(everything(corpus)) for cache in (toys, other))
    step = open_cache(toys).teachers["general"].spec.codec.step
    assert step is not None
    relative = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8}[codec]
    for teacher in ALL:
        for output in OUTPUTS:
            statistics = open_cache(other).teachers[teacher].statistics[output]
            values = np.abs(open_cache(other).read(teacher, output, slice(None), masked="nan"))
            bound = step / 2 + relative * np.nan_to_num(values) / statistics.std + 1e-4
            apart = (plain.targets[teacher][output] - lossless.targets[teacher][output]).abs().numpy()
            assert (apart <= bound).all()
            assert apart.max() > 0
            assert not lossless.targets[teacher][output][BROKEN].any()


def test_rotated_integers_give_the_same_targets_but_for_their_rounding(extract: Extract) -> None:
    rotated = extract("rotated", "codec.name=rotated", general="toy", big="wider", shy="poisoned")
    exact = extract("fp32", "codec.name=fp32", general="toy", big="wider", shy="poisoned")
    for statistics_of in (rotated, exact):  # the run's statistics are the grid's own, or of another cache
        corpus = Corpus([str(statistics_of), str(rotated)], dict.fromkeys(ALL, OUTPUTS), "general")
        batch = DeviceTransfer(corpus, CPU)(corpus.fetch(np.arange(IMAGES, 2 * IMAGES)))
        expected = DeviceTransfer(one := open_both(exact), CPU)(everything(one))
        for teacher in ALL:
            for output in OUTPUTS:
                error = batch.targets[teacher][output] - expected.targets[teacher][output]
                assert 1e-4 < error.square().mean(-1).sqrt().max() <= 0.0251
                assert not batch.targets[teacher][output][BROKEN].any()


def test_a_second_cache_uses_the_statistics_of_the_first(toys: Path, others: Path) -> None:
    corpus = open_both(toys, others)
    assert corpus.rows == IMAGES + 40
    upload = DeviceTransfer(corpus, CPU)
    statistics = open_cache(toys).teachers["big"].statistics["patch"]
    rows = np.array([IMAGES + 3, 2, IMAGES + 39, BROKEN, IMAGES])  # of both, in any order
    found = upload(corpus.fetch(rows)).targets["big"]["patch"]
    own = open_cache(others).read("big", "patch", np.array([3, 39, 0]))
    expected = (own - statistics.centre) / statistics.std
    np.testing.assert_allclose(found[[0, 2, 4]].numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1].numpy(), reference(toys, "big", "patch")[2], rtol=1e-5, atol=1e-5)
    assert not found[3].any()


def test_rows_of_a_cache_that_lacks_a_teacher_count_nothing_for_it(toys: Path, others: Path) -> None:
    corpus = open_both(toys, others)
    batch = DeviceTransfer(corpus, CPU)(everything(corpus))
    assert batch.weights["shy"][IMAGES:].sum() == 0
    assert batch.weights["big"][IMAGES:].sum() == 40
    assert not batch.targets["shy"]["patch"][IMAGES:].any()
    only = DeviceTransfer(corpus, CPU)(corpus.fetch(np.arange(IMAGES, IMAGES + 3)))
    assert only.targets["shy"]["patch"].shape == batch.targets["shy"]["patch"][:3].shape


def test_units_and_labels_and_the_held_back(toys: Path, others: Path) -> None:
    corpus = open_both(toys, others)
    np.testing.assert_array_equal(corpus.units(), [0, 64, 70, 110])
    assert corpus.labels().tolist() == [-1] * corpus.rows
    held = corpus.validation(0.3)
    assert 0 < held.sum() < corpus.rows
    np.testing.assert_array_equal(held[IMAGES : IMAGES + 40], held[:40])  # the keys are the same
    assert not corpus.validation(0).any()


def test_the_digest_tells_caches_and_their_order_but_not_teachers(toys: Path, others: Path) -> None:
    subset = {"general": OUTPUTS, "big": OUTPUTS}
    assert open_both(toys).digest == open_both(toys, wanted=subset).digest
    assert len({open_both(*caches).digest for caches in [(toys,), (toys, others), (others, toys)]}) == 3


@pytest.mark.parametrize(
    ("wanted", "base", "fragments"),
    [
        (
            {"general": OUTPUTS, "none": OUTPUTS},
            "general",
            ["teachers: expected a teacher of the caches (big, ", "found 'none'"],
        ),
        ({"general": ("global", "deep.patch")}, "general", ["teacher 'general'", "not 'deep.patch'", "patch"]),
        ({"none": OUTPUTS}, "none", ["base: expected a teacher of cache ", " (big, ", "general", "found 'none'"]),
        ({"genral": OUTPUTS}, "genral", ["base: ", "found 'genral'; did you mean 'general'?"]),
    ],
)
def test_what_a_cache_lacks_is_named(
    toys: Path, wanted: dict[str, tuple[str, ...]], base: str, fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        Corpus([str(toys)], wanted, base)
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == []


def test_a_missing_base_is_told_with_what_there_is(toys: Path) -> None:
    with pytest.raises(ConfigError, match=r"base: is required and .*give --set base=NAME or base, one of big, gen"):
        validate_config({"caches": [str(toys)]}, "command line")
    with pytest.raises(ConfigError, match=r"base: is required and was not given; give --set base=NAME or base$"):
        validate_config({"caches": [str(toys / "nowhere")]}, "command line")


def test_other_teachers_under_one_name_are_refused(extract: Extract, toys: Path) -> None:
    other = extract("impostor", general="toy", big="toy")
    with pytest.raises(MismatchError, match=r"'big'.*another model, outputs"):
        open_both(toys, other)


def test_which_outputs_a_run_reads(configure: Configure, toys: Path) -> None:
    assert choose_outputs(configure()) == {"general": OUTPUTS, "big": OUTPUTS, "shy": OUTPUTS}
    side = configure(outputs=["patch"], student={"layers": ["global"]}, teachers=["big", "general"])
    assert choose_outputs(side) == {"big": ("patch",), "general": ("patch", "global")}
    with pytest.raises(ConfigError, match="expected the base 'general' among them"):
        choose_outputs(configure(teachers=["big"]))
    del toys


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_batches_for_a_gpu_are_read_into_pinned_memory(toys: Path) -> None:
    corpus = Corpus([str(toys)], ALL, "general", pinned=True)
    batch = everything(corpus)
    assert batch.stored
    for stored in batch.stored.values():
        assert stored.is_pinned()
