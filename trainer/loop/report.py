"""What a training says of itself: at its start, of doubts about it, and at its end."""

from typing import Any, Final

from trainer.config import TrainConfig
from trainer.data.loading import Stream
from trainer.loop.training import Training
from trainer.model import Inheritance

FEW_ROWS: Final = 50  # held back, of which R2 is rough
FEW_STEPS: Final = 50


def student_parameters(model: Inheritance) -> int:
    """How many parameters of the student are trained."""
    return sum(parameter.numel() for parameter in model.student.parameters() if parameter.requires_grad)


def summarise(training: Training, stream: Stream, seconds: float, steps: int) -> dict[str, Any]:
    """What a training did; this process took `seconds` for the last `steps` of its steps."""
    rows_per_step = training.config.batch_size * training.config.optim.accumulate
    return {
        "steps": training.step,
        "planned_steps": training.steps,
        "rows": training.step * rows_per_step,
        "train_rows": stream.rows,
        "validation_rows": len(stream.held_back),
        "seconds": round(seconds, 3),
        "rows_per_second": round(steps * rows_per_step / seconds, 1),
        "parameters": student_parameters(training.model),
    }


def describe_start(training: Training, stream: Stream) -> dict[str, Any]:
    """What is about to be trained, and on what."""
    world = training.world
    return {
        "steps": training.steps,
        "done": training.step,
        "rows": stream.rows,
        "validation_rows": len(stream.held_back),
        "rows_per_step": training.config.batch_size * training.config.optim.accumulate,
        "parameters": student_parameters(training.model),
        "teachers": list(training.model.teachers),
        "processes": world.size,
        "device": str(world.device),
        "precision": world.precision,
    }


def doubts(config: TrainConfig, stream: Stream, steps: int) -> list[str]:
    """Why a training may teach nothing, or not show that it did."""
    found, held = [], len(stream.held_back)
    if held == 0:
        found.append(
            f"no row is held back for validation (validation: {config.validation:g} of {stream.rows:,} rows): nothing "
            "will be measured, and the last weights are kept; raise validation"
        )
    elif held < FEW_ROWS:
        found.append(f"only {held} rows are held back for validation: R2 on so few is rough; raise validation")
    size = config.batch_size * config.optim.accumulate
    if size > stream.rows:
        found.append(
            f"batch_size: a step takes {size:,} rows, more than the {stream.rows:,} to train on, so that each is in it "
            "several times; lower it"
        )
    elif steps < FEW_STEPS:
        found.append(
            f"only {steps} steps: {config.optim.epochs} epochs of {stream.rows:,} rows, {size:,} rows a step; lower "
            "batch_size, or raise optim.epochs"
        )
    return found
