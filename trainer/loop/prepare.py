"""Before the student begins: its base is checked, and the shared space learned, fitted or normalised, then gated."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from kpu.format.teacher import TeacherSpec
from trainer.data.loading import Batch
from trainer.model import Inheritance
from trainer.objective.gates import check_gates, measure_gates
from trainer.objective.losses import worker_count
from trainer.objective.pca import PcaSpace

_NORMALISED_BY: Final = 50  # batches that a placebo's statistics are taken from
_GATED_ROWS: Final = 2048  # that the gates look at, at least
_SHARED_ROWS: Final = 512  # of them with the features of each specialist and the base; else they look further
_MOST_ROWS: Final = 2**17  # that they look at
_LR: Final = 1e-3
_CHECKED_ROWS: Final = 32  # at most, that a base is computed again for
# Root mean square differences of a row, in channel standard deviations, beside half a step of the codec. Another crop
# or interpolation gives some tenths, other weights about 1.
_TOLERANCE: Final = {"fp32": 0.05}
_REDUCED_TOLERANCE: Final = 0.2

LogCallback = Callable[[dict[str, Any]], None]


def check_student(model: Inheritance, spec: TeacherSpec, batches: Iterator[Batch]) -> None:
    """Hold a student that computes the base by itself against the cached base, on some rows of the first batch.

    Args:
        model: whose student it is.
        spec: the base's.
        batches: where the rows come from.

    Raises:
        MismatchError: they differ: another model, other weights, or other images.
    """
    if model.config.student.kind != "parallel":
        return
    from trainer.students.parallel import ParallelStudent  # timm takes seconds to import

    student, batch = model.student, next(batches)
    assert isinstance(student, ParallelStudent)
    kept = (batch.weights[model.base] > 0).nonzero().flatten()[:_CHECKED_ROWS]
    if len(kept):
        assert batch.images is not None
        cached = {output: batch.targets[model.base][output][kept] for output in model.config.outputs}
        tolerance = _TOLERANCE.get(spec.precision, _REDUCED_TOLERANCE) + (spec.codec.step or 0.0) / 2
        student.check_against(cached, batch.images[kept], tolerance)


def prepare_space(
    model: Inheritance,
    shares: Iterator[Batch],
    whole: Callable[[], Iterator[Batch]],
    watch: LogCallback | None = None,
) -> dict[str, float] | None:
    """Fit, freeze and validate the shared space of `model`; what the gates measured, None if there is nothing to.

    A space of the base alone has nothing to learn.

    Args:
        model: whose space it is.
        shares: this process's parts of the training batches, without end, which the maps learn from.
        whole: gives all training rows, the same in every process, in batches of any size.
        watch: is notified of the losses.

    Raises:
        MismatchError: a teacher's map collapsed, or lost the base.
    """
    space, config = model.space, model.config.unify
    if space is None or config.mode == "joint":
        return None
    if not space.specialists:
        space.freeze()
        return None
    if config.mode == "pca":
        assert isinstance(space, PcaSpace)
        space.fit((_targets(model, batch), batch.weights) for batch in whole())
    elif config.mode == "untrained":
        space.train()
        for batch in islice(shares, _NORMALISED_BY):
            space(_targets(model, batch), batch.weights)
    else:
        _learn(model, shares, watch)
    space.freeze()
    return None if config.mode == "untrained" else gate_space(model, whole())


def gate_space(model: Inheritance, batches: Iterator[Batch]) -> dict[str, float]:
    """Measure the space on some of the batches, and refuse one that collapsed. Raises as `prepare_space`."""
    assert model.space is not None
    looked_at = ((_targets(model, batch), batch.weights) for batch in _enough(model, batches))
    report = measure_gates(model.space, looked_at, model.config.loss)
    check_gates(report, model.config.unify)
    return report.flat()


def _enough(model: Inheritance, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches until the gates have seen enough rows, of rare teachers too, or there are no more."""
    assert model.space is not None
    rows, shared = 0, dict.fromkeys(model.space.specialists, 0)
    for batch in batches:
        yield batch
        rows += len(batch)
        for name in shared:
            shared[name] += int(((batch.weights[model.base] > 0) & (batch.weights[name] > 0)).sum())
        if rows >= (_GATED_ROWS if min(shared.values()) >= _SHARED_ROWS else _MOST_ROWS):
            return


def _learn(model: Inheritance, batches: Iterator[Batch], watch: LogCallback | None) -> None:
    space, config = model.space, model.config.unify
    assert space is not None
    space.train()
    optimizer = torch.optim.AdamW(space.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for step, batch in enumerate(islice(batches, config.steps), start=1):
        targets = _targets(model, batch)
        _, terms = space.learn(targets[model.base], targets, batch.weights)
        sum(terms.values(), torch.zeros(())).backward()
        _average_gradients(space)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if watch is not None and (step % model.config.log.every == 0 or step == config.steps):
            watch({"space_step": step, "space": {name: term.item() for name, term in terms.items()}})


def _average_gradients(space: nn.Module) -> None:
    """Over the processes that train together, so that each takes the step of the whole batch."""
    if worker_count() > 1:
        for parameter in space.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= worker_count()


def _targets(model: Inheritance, batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    outputs = model.config.outputs
    return {name: {output: batch.targets[name][output] for output in outputs} for name in model.teachers}
