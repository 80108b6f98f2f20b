"""Trainings in processes that Ray starts: one in several (Ray Train), or several at once (Ray Tune).

The only module of the trainer that knows Ray. Every process runs `trainer.loop.fit.fit`.
"""

import logging
import math
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty
from threading import Event, Thread
from typing import Any, Final

import ray
from ray import train, tune
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from kpu.errors import ConfigError, IncompleteError, KpuError
from kpu.trust.code import naming_models
from kpu.trust.list import Trust, load_trust
from kpu.util.cores import usable_cores
from trainer.config import TrainConfig
from trainer.loop.batches import Live
from trainer.loop.fit import LogCallback, fit
from trainer.util.files import remove_folder, write_error

OBJECT_STORE_BYTES: Final = 100 * 2**20  # only what is logged passes through it
_WORKERS: Final = {"worker_process_setup_hook": "kpu.own_packages.prepare_ray_worker"}
_POLL_SECONDS: Final = 0.5
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

TrialFn = Callable[[int, int], str | None]
"""Does the trial of a number, with so many at once on its machine; why it failed, None if it did not."""


def fit_with_ray(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    address: str | None = None,
    watch: LogCallback | None = None,
    live: Live | None = None,
    trust: Trust | None = None,
) -> dict[str, Any]:
    """`trainer.loop.fit.fit` in `config.workers` processes; the run's summary. `out` must be the same place for all.

    `trust` is as for `fit`, by default what is trusted where this is called.

    Raises:
        ConfigError: there is no such cluster, or it has too few CPUs or GPUs.
        KpuError: what a process raised.
        IncompleteError: a process died.
    """
    trust = naming_models(load_trust(), config.student.model) if trust is None else trust
    with ExitStack() as stack:
        folder = stack.enter_context(connected(address, config.workers))
        gpus = _gpus(config)
        told = Queue(actor_options={"num_cpus": 0})
        settings = {"config": config, "out": out, "resume": resume, "live": live, "trust": trust}
        settings |= {"told": told, "folder": folder}
        trainer = TorchTrainer(
            _train,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=train.ScalingConfig(num_workers=config.workers, use_gpu=gpus),
            run_config=train.RunConfig(name="fit", storage_path=stack.enter_context(_storage(out))),
        )
        failure: Exception | None = None
        with _listening(told, watch) as ended:
            try:
                trainer.fit()
            except SystemExit:  # Ray Train's answer to Ctrl-C, with exit code 0
                raise KeyboardInterrupt from None
            except (train.TrainingFailedError, RayError) as error:
                failure = error
    raised = next((each for each in ended if isinstance(each, KpuError)), None)
    if raised is not None:
        raise raised
    if failure is not None or not ended:
        reason = str(failure).strip().splitlines()[-1] if failure is not None else "it ended without a result"
        raise IncompleteError(f"Ray Train: {reason}; the last checkpoint is safe, --resume goes on")
    summary: dict[str, Any] = ended[0]["summary"]
    return summary


def run_trials(trial: TrialFn, count: int, *, storage: Path, address: str | None, threads: int) -> list[str | None]:
    """Run trials 0 .. count - 1 by Ray Tune, as many at once as there is room for; what each returned.

    Args:
        trial: importable by Ray's workers, or picklable.
        count: how many.
        storage: a folder for Ray's own files.
        address: a running cluster; None for this machine alone.
        threads: CPUs that a trial takes; where there are GPUs, it takes one of them, too.
    """
    with connected(address, threads) as folder:
        gpu = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        beside = min(count, _at_once(threads, gpu))
        trainable = tune.with_resources(_Tried(trial, folder, beside), {"cpu": threads, "gpu": gpu})
        tuner = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(count)))},
            run_config=tune.RunConfig(name="ablate", storage_path=str(storage), verbose=0),
        )
        found: list[str | None] = ["Ray Tune did not run it"] * count
        results = tuner.fit()
        for result in (results[number] for number in range(len(results))):
            if result.config is not None:
                died = None if result.error is None else str(result.error).strip().splitlines()[-1]
                found[result.config["number"]] = died or (result.metrics or {}).get("failure") or None
    return found


class _Tried:
    """A trial as Ray Tune calls it."""

    def __init__(self, trial: TrialFn, folder: Path, beside: int) -> None:
        self._trial, self._folder, self._beside = trial, folder, beside
        self.__name__ = "trial"

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        _enter(self._folder)
        return {"failure": self._trial(values["number"], self._beside) or ""}


def _at_once(threads: int, gpu: int) -> int:
    """How many trials one machine of the cluster has room for, at most."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    rooms = [min(m.get("CPU", 0) // threads, m.get("GPU", 0) // gpu if gpu else math.inf) for m in machines]
    return max(1, int(max(rooms, default=1)))


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[Path]:
    """Ray for the length of a block: the cluster at `address`, or one on this machine with at least `cpus`.

    Yields the working directory, where relative paths begin in the other processes as well.

    Raises:
        ConfigError: there is no such cluster, or it is too small.
    """
    folder = Path.cwd()
    address = address or os.environ.get("RAY_ADDRESS")
    extra: dict[str, Any] = {} if address else {"object_store_memory": OBJECT_STORE_BYTES}
    if not address:
        extra["num_cpus"] = max(cpus, usable_cores())
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_WORKERS,
                **extra,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(_not_reached(address, error)) from None
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
        found = int(ray.cluster_resources().get("CPU", 0))
        if found < cpus:
            raise ConfigError(f"workers: expected at most as many as the Ray cluster has CPUs, {found}, found {cpus}")
        yield folder


def _not_reached(address: str | None, error: Exception) -> str:
    """The message for an address, or for none, where `error` came of it."""
    if address is not None:
        return (
            f"--ray-address: cannot reach a Ray cluster at {address!r} ({error}); start one with `ray start --head`, "
            "give the right address, or leave it out to run on this machine"
        )
    too_long = "AF_UNIX path" in str(error)  # Ray's sockets lie below the folder for temporary files
    remedy = "set RAY_TMPDIR to a short folder, such as /tmp" if too_long else "try again when it is less busy"
    return f"workers: Ray did not start on this machine ({error}); {remedy}, or train with one worker"


def _gpus(config: TrainConfig) -> bool:
    """Whether each process gets a GPU.

    Raises:
        ConfigError: GPUs are asked for, and the cluster has too few.
    """
    found = int(ray.cluster_resources().get("GPU", 0))
    if config.device == "cpu" or (config.device == "auto" and found == 0):
        return False
    if found < config.workers:
        raise ConfigError(
            f"workers: expected at most as many as the Ray cluster has GPUs, {found}, found {config.workers}; lower "
            "it, or use device=cpu"
        )
    return True


@contextmanager
def _storage(out: Path) -> Iterator[str]:
    """A folder for Ray Train's own files, beside the run, where all machines reach it."""
    folder = out.with_name(f".{out.name}.ray-{secrets.token_hex(6)}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise write_error(error, folder) from error
    try:
        yield str(folder)
    finally:
        remove_folder(folder.parent, folder.name)


def _train(settings: dict[str, Any]) -> None:
    """What each process does."""
    _enter(settings["folder"])
    told: Queue = settings["told"]
    leads = train.get_context().get_world_rank() == 0
    try:
        fitted = fit(
            settings["config"],
            settings["out"],
            resume=settings["resume"],
            watch=told.put if leads else None,
            live=settings["live"],
            trust=settings["trust"],
        )
    except KpuError as error:
        told.put(error)
        raise
    if leads:
        told.put({"summary": fitted.summary})


def _enter(folder: Path) -> None:
    """Go where the command was called, where this machine has that folder: paths may be relative to it."""
    if folder.is_dir():
        os.chdir(folder)


@contextmanager
def _listening(told: Queue, watch: LogCallback | None) -> Iterator[list[Any]]:
    """Pass on what is logged while a block runs; what it gives are the errors and the summary that were told."""
    ended: list[Any] = []
    over = Event()

    def listen() -> None:
        while True:
            last = over.is_set()
            try:
                while True:
                    line = told.get(timeout=_POLL_SECONDS)
                    if isinstance(line, KpuError) or "summary" in line:
                        ended.append(line)
                    elif watch is not None:
                        watch(line)
            except Empty:
                pass
            except RayError:  # the queue is gone, and so is who tells
                return
            if last:
                return

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield ended
    finally:  # a thread that waits for Ray when Ray is shut down would end the process without a word
        over.set()
        listener.join()
