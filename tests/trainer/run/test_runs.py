"""The folder of a run: begun once, resumed with the same configuration, readable without its caches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kpu import open_cache
from kpu.errors import ConfigError, CorruptError, MismatchError
from tests.support.toys import write_images
from tests.trainer.conftest import Configure, Extract
from trainer.config import TrainConfig
from trainer.data.corpus import Corpus
from trainer.data.targets import choose_outputs
from trainer.run.runs import RunFolder


def corpus_of(config: TrainConfig) -> Corpus:
    return Corpus(config.caches, choose_outputs(config), config.base)


@pytest.fixture
def begun(configure: Configure, tmp_path: Path) -> RunFolder:
    config = configure()
    return RunFolder.create(tmp_path / "run", config, corpus_of(config))


def test_what_it_was_begun_with_is_read_back(begun: RunFolder, configure: Configure, toys: Path) -> None:
    assert begun.config() == configure()
    sources, cache = begun.sources(), open_cache(toys)
    assert list(sources) == ["general", "big", "shy"]
    for name, source in sources.items():
        teacher = cache.teachers[name]
        assert source.spec == teacher.spec
        assert source.seed == cache.plan.seed
        assert {o: (s.channels, s.grid) for o, s in source.shapes.items()} == {
            o: (spec.channels, spec.grid) for o, spec in teacher.outputs.items()
        }
        for output, statistics in source.statistics.items():
            np.testing.assert_array_equal(statistics.covariance, teacher.statistics[output].covariance)
        assert source.head is not None and teacher.head is not None
        np.testing.assert_array_equal(source.head[0], teacher.head[0])


def test_a_run_or_other_files_that_stand_are_refused(begun: RunFolder, configure: Configure, tmp_path: Path) -> None:
    config = configure()
    with pytest.raises(ConfigError, match=r"a run exists there.*--resume"):
        RunFolder.create(begun.path, config, corpus_of(config))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "other", tmp_path / "file"):
        with pytest.raises(ConfigError, match=r"found (a folder with 'notes\.txt'|a file)"):
            RunFolder.create(path, config, corpus_of(config))


def test_a_run_that_was_killed_while_it_began_can_begin_again(begun: RunFolder, configure: Configure) -> None:
    (begun.path / "config.yaml").rename(begun.path / ".config.yaml.123")
    (begun.path / "heads.safetensors").unlink()
    assert not begun.begun
    config = configure()
    assert RunFolder.create(begun.path, config, corpus_of(config)).begun


def test_what_does_not_decide_what_is_learned_may_change(begun: RunFolder, configure: Configure) -> None:
    config = configure(loader={"threads": 3}, log={"every": 7}, workers=2)
    assert RunFolder.resume(begun.path, config, corpus_of(config)).path == begun.path


def test_caches_that_moved_are_kept_where_they_are_now(
    begun: RunFolder, configure: Configure, toys: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(toys, tmp_path / "moved.kpu"))
    config = configure(caches=[str(moved)])
    assert RunFolder.resume(begun.path, config, corpus_of(config)).config().caches == (str(moved),)


def test_another_configuration_is_refused(begun: RunFolder, configure: Configure) -> None:
    config = configure(seed=5, optim={"lr": 0.5})
    with pytest.raises(MismatchError) as raised:
        RunFolder.resume(begun.path, config, corpus_of(config))
    assert "seed: begun with 0, now 5" in str(raised.value)
    assert "optim.lr: begun with 0.03, now 0.5" in str(raised.value)
    assert "epochs" not in str(raised.value)


def test_other_caches_are_refused(begun: RunFolder, configure: Configure, extract: Extract) -> None:
    other = extract("coarse", "codec.step=0.5", general="toy", big="wider", shy="poisoned")
    config = configure(caches=[str(other)])
    with pytest.raises(MismatchError, match=r"begun with \S+/toys\.kpu, now \S+/coarse\.kpu, .*start a new run"):
        RunFolder.resume(begun.path, config, corpus_of(config))


def test_paths_of_caches_are_kept_absolute(
    configure: Configure, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toys.parent)
    config = configure(caches=[toys.name])
    run = RunFolder.create(tmp_path / "run", config, corpus_of(config))
    assert run.config().caches == (str(toys),)


def test_one_cache_by_two_names_is_refused(configure: Configure, toys: Path, tmp_path: Path) -> None:
    config = configure(caches=[str(toys), f"{toys.parent}/./{toys.name}"])
    with pytest.raises(ConfigError, match=r"expected each cache once, found \S+/toys\.kpu again"):
        RunFolder.create(tmp_path / "run", config, corpus_of(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["link", "copy"])
def test_one_cache_by_a_link_or_as_a_copy_is_refused(
    configure: Configure, toys: Path, tmp_path: Path, how: str
) -> None:
    again = tmp_path / "again.kpu"
    if how == "link":
        again.symlink_to(toys)
    else:
        shutil.copytree(toys, again)
    config = configure(caches=[str(toys), str(again)])
    with pytest.raises(ConfigError, match=r"each cache once, found \S+/again\.kpu again \(it is \S+/toys\.kpu"):
        RunFolder.create(tmp_path / "run", config, corpus_of(config))


def test_images_are_known_by_the_plan_or_by_where_and_what_they_are(
    begun: RunFolder, toys: Path, place: Path, extract: Extract
) -> None:
    again = extract("again", "unit_rows=128", general="toy")
    other = extract("other-images", images=write_images(place / "other-images", 8), general="toy")
    assert open_cache(again).plan.digest != open_cache(toys).plan.digest
    assert [begun.learned_from(open_cache(path)) for path in (toys, again, other)] == [True, True, False]


def test_no_run(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    with pytest.raises(ConfigError, match="expected a run of kpu-train"):
        RunFolder.resume(tmp_path, config, corpus_of(config))


def test_a_missing_or_damaged_file_is_named(begun: RunFolder) -> None:
    (begun.path / "heads.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptError, match=r"heads\.safetensors"):
        begun.sources()
    (begun.path / "sources.json").unlink()
    with pytest.raises(CorruptError, match=r"sources\.json"):
        begun.sources()


def test_metrics_are_kept_up_to_a_step_and_a_cut_line_is_left_out(begun: RunFolder) -> None:
    assert begun.metrics() == []
    for step in (1, 2, 3):
        begun.log({"step": step, "loss": float("nan")})
    with (begun.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in begun.metrics()] == [1, 2, 3]
    begun.keep_metrics(2)
    begun.log({"step": 9})
    text = (begun.path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None},
        {"step": 9},
    ]


def test_the_summary_is_json_without_nan(begun: RunFolder) -> None:
    assert begun.summary() is None
    summary = {"steps": 1, "seconds": 0.5, "parameters": 2, "validation_rows": 3}
    scores = {"teachers": {"big": {"r2_global": float("nan")}}, "base": {"r2": 1, "rows": [1, float("inf")]}}
    begun.finish({"model.safetensors": b""}, {**summary, "validation": scores})
    without = {"teachers": {"big": {"r2_global": None}}, "base": {"r2": 1, "rows": [1, None]}}
    assert begun.summary() == {**summary, "validation": without}


@pytest.mark.parametrize("line", [b"{\x00\x00", b"\xff{}", b"[]", b"{}"])
def test_a_damaged_line_of_metrics_is_named(begun: RunFolder, line: bytes) -> None:
    (begun.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl: line 2: .*remove the line"):
        begun.keep_metrics(1)


def test_a_damaged_environment_is_named(begun: RunFolder) -> None:
    (begun.path / "environment.json").write_bytes(b"[{")
    with pytest.raises(CorruptError, match=r"environment\.json: is no list in JSON .*remove it"):
        begun.write_environment({})


def test_each_process_adds_its_environment(begun: RunFolder) -> None:
    for number in range(2):
        begun.write_environment({"number": number})
    found = json.loads((begun.path / "environment.json").read_text())
    assert [entry["number"] for entry in found] == [0, 1]
    assert {"torch", "python", "command"} <= found[0].keys()
