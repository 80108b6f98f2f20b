"""What a file is by its name."""

from typing import Final, Literal

Kind = Literal["folder", "tar", "parquet"]

IMAGES: Final = frozenset(
    {"jpg", "jpeg", "jpe", "jfif"}
    | {"png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif"}
    | {"heic", "heif", "hif", "jxl"}  # with a plug-in; else their rows say which
    | {"ppm", "pgm", "pbm", "pnm"}
)
MACOS: Final = "__MACOSX"
"""The folder that macOS adds to its archives: of hidden files alone."""
_PARQUET: Final = (".parquet", ".pq")
_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


def extension(name: str) -> str:
    """What follows the last dot, in lower case."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def kind_by_name(path: str) -> Kind | None:
    """The kind of source that a file is or belongs to; None for a file that is none."""
    name = path.lower()
    if name.endswith(".tar") or (name.endswith(_COMPRESSED) and (".tar." in name or extension(name).startswith("t"))):
        return "tar"
    if name.endswith(_PARQUET):
        return "parquet"
    return "folder" if extension(name) in IMAGES else None


def is_archive(path: str) -> bool:
    """Whether a file is a compressed tar, which cannot be read in place: a download that was unpacked, most often."""
    return path.lower().endswith(_COMPRESSED)
