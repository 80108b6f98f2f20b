"""`config.yaml` of a run: the resolved configuration, below a digest of all keys but `MAY_CHANGE`."""

from pathlib import Path
from typing import Any, Final

from kpu.errors import ConfigError, CorruptError, MismatchError
from kpu.storage.found import describe_place
from trainer.config import TrainConfig, validate_config
from trainer.run.place import CONFIG, FOLDERS
from trainer.util.files import read_file, refuse_links
from trainer.util.sealed import open_yaml

MAY_CHANGE: Final = frozenset({"caches", "images", "loader", "log", "workers"})
"""Keys that a run may be resumed with other values of: none of them decides what is learned."""


def read_config(run: Path) -> TrainConfig:
    """The resolved configuration of the run in a folder.

    Raises:
        ConfigError: there is no run.
        CorruptError: the file is damaged.
    """
    file = run / CONFIG
    refuse_links(run, FOLDERS)
    try:
        data = read_file(file)
    except OSError as error:
        raise ConfigError(
            f"{run}: expected a run of kpu-train, found {describe_place(run)} ({error.strerror}); check the path"
        ) from None
    values = open_yaml(file, data, MAY_CHANGE)
    try:
        return validate_config(values, "as read")
    except ConfigError as error:
        raise CorruptError(str(file), f"is damaged, or of another release of KPU ({error})") from None


def changed_keys(run: Path, config: TrainConfig) -> list[str]:
    """A line for each key, `MAY_CHANGE` aside, in which `config` differs from what the run was begun with."""
    begun, asked = (each.model_dump(mode="json") for each in (read_config(run), config))
    return [line for key in asked if key not in MAY_CHANGE for line in _differences(key, begun[key], asked[key])]


def require_same(run: Path, differences: list[str]) -> None:
    """Refuse to resume a run with other values.

    Raises:
        MismatchError: there are any.
    """
    if differences:
        raise MismatchError(
            f"{run}: expected what the run was begun with, found {'; '.join(differences)}; give the same, or start a "
            "new run"
        )


def _differences(key: str, begun: Any, asked: Any) -> list[str]:
    """A line for each value that differs, by the key under which it is."""
    if isinstance(begun, dict) and isinstance(asked, dict):
        return [line for each in asked for line in _differences(f"{key}.{each}", begun.get(each), asked[each])]
    return [] if begun == asked else [f"{key}: begun with {begun!r}, now {asked!r}"]
