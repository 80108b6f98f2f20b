"""What computes in a module of anyone's own besides its state_dict: tensors elsewhere, compiled programs, files.

A digest of these is part of a teacher's identity: other weights in an ONNX file, a TorchScript program or a plain
attribute are another teacher. Most modules have none of them, and no such digest.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import gethostname
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from kpu.errors import TeacherError
from kpu.torch.weights import weights_digest
from kpu.util.digests import DIGEST_BYTES, digest, digest_of
from pipeline.teachers.custom.programs import exported_text, is_exported, is_script, programs, script_digest
from pipeline.teachers.custom.search import Holding, search

FILES: Final = "program_files"  # the attribute that names files
_BLOCK: Final = 2**20


def identify(module: nn.Module, factory: Callable[..., Any], own: ModuleType, folder: Path, who: str) -> str | None:
    """Digest of what computes besides the state_dict of a module that `factory` gave; None if nothing does.

    Args:
        module: frozen, before its first forward pass.
        factory: of the user's.
        own: the module of the user's that has it.
        folder: that relative names of files begin at.
        who: names the teacher in messages.

    Raises:
        TeacherError: nothing is found that weights could be in, or weights are out of sight, and no files are named.
    """
    found = search(module, own, factory)
    parts = [["program", name, _digest(part)] for name, part in programs(module)]
    parts += [["tensor", name, _digest(value)] for name, value in found.held]
    files = getattr(module, FILES, None)
    if files is None:
        _require_weights(module, bool(parts), found.opaque, who)
    parts += [["file", str(number), each] for number, each in enumerate(_files(files or (), folder, who))]
    return digest_of(sorted(parts)) if parts else None


def hidden_digests(module: nn.Module) -> dict[str, str]:
    """Digests by name of the tensors that no state_dict has: buffers that are not persistent, and plain attributes."""
    state = module.state_dict().keys()
    hidden = {name: _digest(buffer) for name, buffer in module.named_buffers() if name not in state}
    return hidden | {name: _digest(value) for name, value in search(module).held}


def _require_weights(module: nn.Module, found: bool, opaque: tuple[str, ...], who: str) -> None:
    advice = (
        f"name the files that it computes with in an attribute of the module, self.{FILES} = [path, ...], so that "
        "other weights are another teacher"
    )
    if opaque:
        raise TeacherError(f"{who}: expected weights that can be told apart, found {', '.join(opaque)}; {advice}")
    if not found and next(module.buffers(), None) is None and next(module.parameters(), None) is None:
        raise TeacherError(
            f"{who}: expected a module with parameters or buffers, found none; {advice}, or [] where its code is all "
            "there is"
        )


def _files(files: Any, folder: Path, who: str) -> Iterator[str]:
    """Digests of the contents of the files that a module names, and of those below the folders."""
    if not isinstance(files, list | tuple) or not all(isinstance(each, str | Path) for each in files):
        raise TeacherError(f"{who}: {FILES}: expected a list of paths, found {files!r}")
    for each in files:
        place = folder / Path(each).expanduser()
        inside = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        for path in inside:
            try:
                yield _file_digest(path)
            except OSError as error:
                raise TeacherError(
                    f"{who}: {FILES}: expected a file at {path} on {gethostname()}, found none that can be read "
                    f"({error.strerror}); only the Python file is sent to workers: put this one there"
                ) from None


def _file_digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _digest(value: Holding) -> str:
    if isinstance(value, ExportedProgram):
        value = value.module()
    if isinstance(value, nn.Module):
        if is_script(value):
            return script_digest(value)
        text = exported_text(value) if is_exported(value) else []
        return digest_of([weights_digest(value), hidden_digests(value), text])
    if isinstance(value, np.ndarray):
        kind, raw = str(value.dtype), digest(np.ascontiguousarray(value).tobytes())
    else:
        kind = str(value.dtype)
        raw = digest(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest_of([kind, list(value.shape), raw])
