"""What a training can be refused for before torch is loaded, beside its folder: its caches, the device."""

import sys
from pathlib import Path
from typing import Final

from kpu.errors import ConfigError
from kpu.reading.cache import open_cache
from kpu.storage.found import describe_place
from kpu.torch.checkpoints import split_entry
from trainer.config import TrainConfig
from trainer.data.targets import choose_outputs, not_among, require
from trainer.run.config_file import changed_keys, read_config, require_same

_GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def check_start(config: TrainConfig) -> None:
    """Look at all that is cheap to look at; `trainer.loop.fit.fit` looks again, and at more.

    Raises:
        ConfigError: a cache lacks the base or no cache has one of the teachers; or a GPU is asked for on a machine
            without one.
        NotACacheError: one of the caches is none.
    """
    if config.device == "cuda" and sys.platform == "linux" and not any(map(_exists, _GPU_DEVICES)):
        raise ConfigError("device: expected a GPU, found none on this machine; use --set device=cpu")
    caches = [open_cache(path) for path in config.caches]
    for cache in caches:
        require(config.base in cache.teachers, f"base: {not_among(config.base, cache.teachers, f'cache {cache.path}')}")
    for layer in config.student.layers:
        for cache in caches:
            outputs = cache.teachers[config.base].outputs
            place = f"the base {config.base!r} in cache {cache.path}"
            require(layer in outputs, f"student.layers: {not_among(layer, outputs, place, 'an output')}")
    known = {name for cache in caches for name in cache.teachers}
    for name in choose_outputs(config):
        require(name in known, f"teachers: {not_among(name, known, 'the caches')}")
    _check_weights(config.student.weights)


def _check_weights(weights: str | None) -> None:
    if weights is None or weights == "random":
        return
    place, _ = split_entry(weights)
    if not Path(place).is_file():
        raise ConfigError(
            f"student.weights: expected a .safetensors or .pth file, found {describe_place(place)} at {place}; give "
            "its path"
        )


def check_resumed(run: Path, config: TrainConfig) -> None:
    """Check that a run can be resumed with a configuration.

    Raises:
        MismatchError: a key that decides what is learned has another value.
        CorruptError: the configuration of the run is damaged.
    """
    if config.teachers is None:  # as when it was begun
        config = config.model_copy(update={"teachers": read_config(run).teachers})
    require_same(run, changed_keys(run, config))


def _exists(path: str) -> bool:
    return Path(path).exists()
