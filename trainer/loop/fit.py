"""`kpu-train fit`, from top to bottom: open the caches, build the model, train, keep what was learned."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch

from kpu.errors import ConfigError, KpuError
from kpu.trust.code import CodeLoader, naming_models
from kpu.trust.list import Trust, load_trust, remember
from kpu.util.failpoints import failpoint
from trainer.config import TrainConfig, as_config
from trainer.data.corpus import Corpus
from trainer.data.loading import BatchLoader, DeviceTransfer, Stream
from trainer.data.resident import RowNumbers
from trainer.data.split import some_of
from trainer.data.targets import choose_outputs
from trainer.loop.batches import Live, draw_batches, first_epoch, open_corpus, open_loader, open_stream
from trainer.loop.events import Events
from trainer.loop.prepare import check_student, gate_space, prepare_space
from trainer.loop.report import describe_start, doubts, summarise
from trainer.loop.scores import batches_of, score
from trainer.loop.selection import Selection, choose_weights
from trainer.loop.training import Training
from trainer.loop.world import World, join_world
from trainer.model import Inheritance
from trainer.run.checkpoint import load_checkpoint, save_checkpoint
from trainer.run.repeated import shared_images
from trainer.run.runs import RunFolder
from trainer.util.files import lock

VALIDATION_ROWS: Final = 4096  # at most, on the way; all of them at the end

LogCallback = Callable[[dict[str, Any]], None]
"""Called with each object that is logged, and with each `note`."""


@dataclass(frozen=True)
class Fitted:
    """How a training ended."""

    path: Path
    summary: dict[str, Any]


def fit(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    watch: LogCallback | None = None,
    live: Live | None = None,
    trust: Trust | None = None,
) -> Fitted:
    """Train the student that `config` describes, and keep it with everything it depends on in the folder `out`.

    `config` is a configuration, its plain values, or the path of a YAML file.

    With `resume` a run that was interrupted goes on from its last checkpoint, to the same end, sample for sample.
    `trust` says which code may run; by default what the user's list has, and what `config` names, which joins it.

    Raises:
        TrustError: the student's code, or the base's, may not run.
        ConfigError: the caches lack something, do not fit, or a run exists at `out`; nothing there was changed.
        MismatchError: the run was begun with another configuration or other caches, or images changed.
        TrainingError: the loss is not finite, or a part of the model collapsed.
    """
    config, out = as_config(config), Path(out)
    world = join_world(config)
    watch = watch if world.leads else None
    config = choose_teachers(config, out, resume=resume)
    corpus = open_corpus(config, world)
    torch.manual_seed(config.seed)
    trust = naming_models(load_trust(), config.student.model) if trust is None else trust
    codes = CodeLoader(trust, RunFolder(out).code() if resume else None)
    model = Inheritance(config, corpus.sources, codes).to(world.device)
    stream = open_stream(config, corpus)
    steps = count_steps(config, stream.rows)

    with ExitStack() as stack:
        loader = stack.enter_context(open_loader(config, corpus, model, live))
        upload = DeviceTransfer(corpus, world.device, model.student.input, raw=config.targets.source == "live")
        check_student(model, corpus.sources[config.base].spec, first_epoch(config, stream, loader, upload, images=True))
        run = open_run(config, out, corpus, world, resume=resume, code=codes.digests)
        unkept = remember(codes.ran) if world.leads else None
        for note in [*shared_images(corpus.caches), *([unkept] if unkept else [])]:
            if watch is not None:
                watch({"note": note})
        finished = run.summary()
        if finished is not None:
            world.leave()
            return Fitted(out, finished)
        world.lead(lambda: stack.enter_context(lock(run.lock)))
        checkpoint = load_checkpoint(run.checkpoints) if resume else None
        if checkpoint is None:
            learn_space(model, stream, loader, upload, world, run, watch, resume=resume)
        else:
            model.settle_space()
        training = Training(config, model, world, steps)
        position = 0
        if checkpoint is not None:
            training.restore(checkpoint)
            position = checkpoint.position
        events = stack.enter_context(Events(run, world, training.step, watch))
        selection = Selection(config, world, run.best, steps, some_of(stream.held_back, VALIDATION_ROWS, config.seed))
        selection.replay(run.metrics())
        if watch is not None:
            watch({"begin": describe_start(training, stream)})
            for note in doubts(config, stream, steps):
                watch({"note": note})
        begun_at = training.step
        loader.waited = 0.0

        seconds = perf_counter()
        position = train(training, stream, loader, upload, position, run, events, selection)
        seconds = perf_counter() - seconds

        def measure(rows: RowNumbers) -> dict[str, Any]:
            return score(training.trained, batches_of(rows, config.rows_per_worker, loader, upload))

        weights, chosen = choose_weights(selection, training.trained, training.step, stream.held_back, measure)
    summary = {**summarise(training, stream, seconds, training.step - begun_at), "position": position, **chosen}
    if world.leads:
        run.finish(weights, summary)
    world.wait()
    world.leave()
    return Fitted(out, summary)


def learn_space(
    model: Inheritance,
    stream: Stream,
    loader: BatchLoader,
    upload: DeviceTransfer,
    world: World,
    run: RunFolder,
    watch: LogCallback | None,
    *,
    resume: bool,
) -> None:
    """Prepare the shared space, and keep its figures; delete a new run if the gates fail.

    Raises:
        MismatchError: the space collapsed, or lost the base.
    """
    config = model.config
    drawn = draw_batches(stream, config.batch_size, share=world.share(config.batch_size))
    shares = (upload(host) for _, host in loader.load(drawn, images=False))
    try:
        figures = prepare_space(model, shares, partial(first_epoch, config, stream, loader, upload), watch)
    except KpuError:
        if world.leads and not resume:
            run.discard()  # nothing was learned: the next attempt may have the same folder
        raise
    if world.leads and figures is not None:
        run.write_space(figures)


def train(
    training: Training,
    stream: Stream,
    loader: BatchLoader,
    upload: DeviceTransfer,
    position: int,
    run: RunFolder,
    events: Events,
    selection: Selection,
) -> int:
    """Take the steps that are left, logging, validating and saving on the way; where the next batch would begin."""
    config, world = training.config, training.world
    each = config.optim.accumulate
    left = (training.steps - training.step) * each
    drawn = draw_batches(stream, config.batch_size, position, world.share(config.batch_size))
    loaded = loader.load(islice(drawn, left))
    while training.step < training.steps and not training.world.agree(selection.exhausted):
        pairs = list(islice(loaded, each))
        position = pairs[-1][0].position
        due = (training.step + 1) % config.log.every == 0 or training.step == 0
        losses = training.advance([upload(host) for _, host in pairs], measure=due)
        if due:
            training.check_finite()
            events.log(training, losses, loader.waited)
        failpoint("train.step")
        if selection.due(training.step):
            training.check_finite()
            scores = score(training.trained, batches_of(selection.rows, config.rows_per_worker, loader, upload))
            events.validated(training.step, scores)
            selection.offer(training.step, scores, training.trained)
        if training.step % config.log.checkpoint == 0 or training.step == training.steps or selection.exhausted:
            training.check_finite()
            gate_joint_space(training, stream, loader, upload, run)
            if world.leads:
                save_checkpoint(run.checkpoints, training.checkpoint(position))
            world.wait()
    return position


def gate_joint_space(
    training: Training, stream: Stream, loader: BatchLoader, upload: DeviceTransfer, run: RunFolder
) -> None:
    """Refuse a space that learns along with the student and has collapsed; nothing of it is saved then.

    Raises:
        MismatchError: naming the teacher and the figure.
    """
    config, space = training.config, training.model.space
    if config.unify.mode == "joint" and space is not None and space.specialists:
        figures = gate_space(training.model, first_epoch(config, stream, loader, upload))
        if training.world.leads:
            run.write_space(figures)


def choose_teachers(config: TrainConfig, out: Path, *, resume: bool) -> TrainConfig:
    """Name the teachers where `teachers` is null: those of the caches now, or of the run when it was begun.

    Raises:
        ConfigError: there is no run to resume.
    """
    names = config.teachers
    if names is None and resume:
        names = RunFolder(out).config().teachers
    return config.model_copy(update={"teachers": names or tuple(choose_outputs(config))})


def open_run(
    config: TrainConfig, out: Path, corpus: Corpus, world: World, *, resume: bool, code: Mapping[str, str]
) -> RunFolder:
    """The run's folder, which the leading process makes; `code` are digests, by model, of code that was run."""

    run = RunFolder(out)

    def begin() -> None:
        nonlocal run
        run = RunFolder.resume(out, config, corpus) if resume else RunFolder.create(out, config, corpus, code)
        run.write_environment(
            {"device": str(world.device), "threads": torch.get_num_threads(), "precision": world.precision}
        )

    world.lead(begin)
    return run


def count_steps(config: TrainConfig, rows: int) -> int:
    """Steps of the whole training.

    Raises:
        ConfigError: there are fewer rows than one step takes.
    """
    size = config.batch_size * config.optim.accumulate
    steps = config.optim.epochs * rows // size
    if rows == 0 or steps == 0:
        raise ConfigError(
            f"batch_size: expected at most the {rows * config.optim.epochs} rows of all epochs in a step, found "
            f"{size}; lower batch_size or validation"
        )
    return steps
