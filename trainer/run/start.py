"""What a training can be refused for before torch is loaded, beside its folder: its caches, the device."""

import sys
from pathlib import Path
from typing import Final

from kpu.errors import ConfigError
from kpu.reading.cache import open_cache
from trainer.config import TrainConfig
from trainer.data.targets import choose_outputs, not_among, require

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
    known = {name for cache in caches for name in cache.teachers}
    for name in choose_outputs(config):
        require(name in known, f"teachers: {not_among(name, known, 'the caches')}")


def _exists(path: str) -> bool:
    return Path(path).exists()
