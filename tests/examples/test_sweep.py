"""The sweep that users copy: it is read as it stands, and begins from the demo's training."""

from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.sweep.sweeps import load_sweep

ROOT = Path(__file__).parents[2]


def test_the_sweep_is_read_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(Path("examples/sweep.yaml"))
    assert (len(sweep.cells), sweep.seeds, len(sweep.trials)) == (4, (0, 1, 2), 12)
    first = sweep.trials[0].config
    demo = load_config("examples/demo/train.yaml", overrides=["student.merge=concat"])
    assert first == demo
    assert sweep.trials[-1].config.loss.mse == 1
