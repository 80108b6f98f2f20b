"""Names in a dataset of Theia's:

<root>/<dataset>/splits.json                                               samples by split
<root>/<dataset>/images/<dataset>_<split>-000000-<split>.tar               <key>.image, an .npy file
<root>/<dataset>/<model>/<dataset>_<split>-000000-<split>.tar              <key>.<model>.safetensors
"""

import re
from typing import Any, Final

from kpu.errors import ConfigError, CorruptError
from kpu.util.strict_json import parse_json_object

SPLITS: Final = "splits.json"
IMAGES: Final = "images"
IMAGE: Final = "image"
"""The extension of an image."""

EMBEDDING: Final = "embedding"
CLS_TOKEN: Final = "cls_token"
SAMPLES_PER_TAR: Final = 1000

_DATASET: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SPLIT: Final = re.compile(r"[A-Za-z0-9_]+")


def check_names(dataset: str, split: str) -> None:
    """Check that both are fit for file names, and that one split's tars are not taken for another's.

    Raises:
        ConfigError: naming the option.
    """
    if not _DATASET.fullmatch(dataset):
        raise ConfigError(f"dataset: expected letters, digits, '_', '.' and '-', found {dataset!r}; give --dataset")
    if not _SPLIT.fullmatch(split):
        raise ConfigError(f"split: expected letters, digits and '_', found {split!r}; choose another --split")


def tar_name(dataset: str, split: str, number: int) -> str:
    """The file name of a tar, in every column."""
    return f"{dataset}_{split}-{number:06d}-{split}.tar"


def is_tar_of(name: str, split: str) -> bool:
    """Whether Theia's loader takes the file of this name for a part of the split."""
    return name.endswith(f"-{split}.tar") and not name.startswith(".")


def folder_of(model: str) -> str:
    """The folder of a model's column."""
    return model.replace("/", "_")


def extension_of(model: str) -> str:
    """What follows the key in the name of a model's features."""
    return f"{folder_of(model).lower()}.safetensors"


def parse_splits(raw: bytes, file: str) -> dict[str, Any]:
    """What `splits.json` says: the number of samples by split.

    Raises:
        CorruptError: it is no JSON object.
    """
    try:
        return parse_json_object(raw)
    except ValueError as error:
        raise CorruptError(file, f"is not JSON ({error})") from None
