"""Checkpoints: weights in safetensors, the rest loadable with `weights_only=True`, published whole, the last two kept.

A checkpoint is a folder `checkpoints/step-<number>` that appears by a rename once all of it is synced. `seal.json`
holds the digest of each other file, so that one that was damaged since is passed over for the one before it.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from kpu.errors import CorruptError, LinkError
from kpu.util.digests import digest
from kpu.util.failpoints import failpoint
from kpu.util.strict_json import parse_json_object
from trainer.util.files import publish_folder, read_file, remove_folder

KEPT: Final = 2
_NAME: Final = re.compile(r"step-\d{9,}")
_UNFINISHED: Final = re.compile(r"\.step-\d{9,}\.\w+")
_MODEL, _AVERAGE, _STATE, _SEAL = "model.safetensors", "average.safetensors", "state.pt", "seal.json"


class _State(BaseModel):
    """What `state.pt` holds."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, strict=True)

    step: Annotated[int, Field(ge=0, lt=2**63)]
    position: Annotated[int, Field(ge=0, lt=2**63)]
    optimizer: dict[str, Any]
    generators: dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A state of training after `step` steps; the next batch begins at `position` (see `trainer.data.loading.Stream`).

    `average` is the moving average of the model's weights, None if none is kept; `generators` are the states of
    torch's random generators by kind of device.
    """

    step: int
    position: int
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    generators: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint below `folder`, then remove all but the last ones.

    Those of later steps go, too: a run that passed over a damaged one comes to its step again. So does what a killed
    process left half written.

    Raises:
        FullDiskError: no space is left; existing checkpoints stay.
        StorageError: it cannot be written there.
    """
    state = io.BytesIO()
    torch.save(
        {
            "step": checkpoint.step,
            "position": checkpoint.position,
            "optimizer": checkpoint.optimizer,
            "generators": checkpoint.generators,
        },
        state,
    )
    files = {_MODEL: pack_tensors(checkpoint.model), _STATE: state.getvalue()}
    if checkpoint.average is not None:
        files[_AVERAGE] = pack_tensors(checkpoint.average)
    files[_SEAL] = json.dumps({name: digest(data) for name, data in files.items()}).encode()
    path = folder / f"step-{checkpoint.step:09d}"
    failpoint("train.checkpoint")
    publish_folder(path, files)
    failpoint("train.checkpointed")
    existing = _all(folder)
    last = existing.index(path) + 1
    unfinished = [each for each in folder.iterdir() if _UNFINISHED.fullmatch(each.name)]
    for old in [*existing[: max(0, last - KEPT)], *existing[last:], *unfinished]:
        remove_folder(folder.parent, f"{folder.name}/{old.name}")


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint that is whole; None if none was made yet.

    Raises:
        CorruptError: there are checkpoints, and every one is damaged.
    """
    problems = []
    for path in reversed(_all(folder)):
        try:
            return _load(path)
        except CorruptError as error:
            problems.append(str(error))
    if problems:
        raise CorruptError(str(folder), f"holds no checkpoint that is whole: {'; '.join(problems)}")
    return None


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of a state dict; equal input gives equal bytes."""
    # Copies, since safetensors refuses a tensor that a module holds under two names.
    return save_tensors(
        {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
    )


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, copied to host memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def _all(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("step-*") if _NAME.fullmatch(each.name) and not each.is_symlink())


def _load(path: Path) -> Checkpoint:
    try:
        seal = parse_json_object(read_file(path / _SEAL))
        if not {_MODEL, _STATE} <= seal.keys() <= {_MODEL, _STATE, _AVERAGE}:
            raise ValueError(f"{_SEAL}: expected digests of {_MODEL}, {_STATE} and maybe {_AVERAGE}, found {[*seal]}")
        files = {name: read_file(path / name) for name in seal}
    except (OSError, LinkError, ValueError) as error:
        raise CorruptError(str(path), f"cannot be read ({error})") from None
    for name, data in files.items():
        if digest(data) != seal[name]:
            raise CorruptError(str(path / name), "is not what was saved")
    try:
        state = _State.model_validate(torch.load(io.BytesIO(files[_STATE]), weights_only=True))
        average = load_tensors(files[_AVERAGE]) if _AVERAGE in files else None
        model = load_tensors(files[_MODEL])
    except Exception as error:  # torch's reader raises nearly anything where the bytes are not its own
        raise CorruptError(str(path), f"holds no checkpoint ({type(error).__name__}: {error})") from None
    return Checkpoint(state.step, state.position, model, average, state.optimizer, state.generators)
