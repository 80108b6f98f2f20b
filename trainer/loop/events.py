"""What a training says of itself: one object a logged step, in `metrics.jsonl` and as TensorBoard events."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import TracebackType
from typing import Any, Final

import torch
from torch.utils.tensorboard import SummaryWriter

from trainer.loop.training import Training
from trainer.loop.world import World
from trainer.model import Losses
from trainer.objective.losses import over_workers, worker_count
from trainer.run.runs import RunFolder
from trainer.util.files import write_error

_TENSORBOARD: Final = "tensorboard"
_WRITER: Final = "_AsyncWriterThread"


class Events:
    """Writes what is logged, in the leading process; what a former process logged after `step` is forgotten.

    TensorBoard writes in a thread of its own: where that fails, it shows with a later event, or at the end.

    Raises (all methods, and leaving the context):
        FullDiskError: no space is left.
        StorageError: it cannot be written.
    """

    def __init__(self, run: RunFolder, world: World, step: int, watch: Callable[[dict[str, Any]], None] | None) -> None:
        self._run, self._leads, self._watch = run, world.leads, watch
        self._writer: SummaryWriter | None = None
        if self._leads:
            run.keep_metrics(step)
            with self._written():
                self._writer = SummaryWriter(str(run.path / _TENSORBOARD), purge_step=step + 1)
            self._hook, threading.excepthook = threading.excepthook, self._pass_over
        self._begin(step, 0.0)

    def __enter__(self) -> "Events":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        try:
            if error is not None:
                with suppress(OSError):  # the first error says more
                    self._writer.close()
                return
            with self._written():
                self._writer.flush()  # closing alone forgets what the thread failed with
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def log(self, training: Training, losses: Losses, waited: float) -> None:
        """Write the losses of this step, and the speed since the last one that was logged.

        `waited` is for how many seconds, in all, the training waited for data.
        """
        seconds = perf_counter() - self._clock
        rows = (training.step - self._step) * training.config.batch_size * training.config.optim.accumulate
        line: dict[str, Any] = {
            "step": training.step,
            "rows": training.step * training.config.batch_size * training.config.optim.accumulate,
            "lr": training.optimizer.param_groups[0]["lr"],
            **_figures(losses),
            "gradient_norm": _floats(training.gradient_norm),
            "gradient_cosine": {name: _floats(others) for name, others in training.gradient_cosine.items()},
            "rows_per_second": round(rows / seconds, 1),
            "data_wait": round((waited - self._waited) / seconds, 4),
        }
        self._write(line)
        self._begin(training.step, waited)

    def validated(self, step: int, scores: dict[str, Any]) -> None:
        """Write what validation rows say after `step`."""
        self._write({"step": step, "validation": scores})

    def _pass_over(self, failure: "threading.ExceptHookArgs") -> None:
        """Print no traceback of TensorBoard's thread: what it failed with is raised here later."""
        if type(failure.thread).__name__ != _WRITER:
            self._hook(failure)

    @contextmanager
    def _written(self) -> Iterator[None]:
        folder = self._run.path / _TENSORBOARD
        try:
            yield
        except OSError as error:
            raise write_error(error, folder) from error

    def _begin(self, step: int, waited: float) -> None:
        self._step, self._waited, self._clock = step, waited, perf_counter()

    def _write(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            return
        self._run.log(line)
        with self._written():
            for name, value in _flat(line):
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])
        if self._watch is not None:
            self._watch(line)


def _figures(losses: Losses) -> dict[str, Any]:
    """The terms of the whole batch: the means over the processes that share it."""
    found = _floats({name: over_workers(term) / worker_count() for name, term in losses.terms().items()})
    nested: dict[str, Any] = {"loss": 0.0, "preserve": 0.0, "s2t": {}, "t2s": {}, "space": {}}
    for name, value in found.items():
        section, _, key = name.partition("/")
        if key:
            nested[section][key] = value
        else:
            nested[section] = value
    return nested


def _floats(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Their values, fetched from the device at once."""
    if not tensors:
        return {}
    values = torch.stack([tensor.detach().float() for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}/")
        else:
            found.append((f"{prefix}{name}", value))
    return found
