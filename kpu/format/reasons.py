"""Why rows are masked, in words, and what can be done about it."""

from typing import Final

import numpy as np
import numpy.typing as npt

from kpu.format.commits import ImageStatus

_S = ImageStatus
_UNREAD_FORMAT: Final = "write it as PNG or JPEG, then extract into a new cache"

_TEXTS: Final = {
    _S.UNSUPPORTED_PIXELS: "unsupported depth, sample format or compression",
    _S.SEVERAL_BANDS: "more bands than red, green, blue and alpha",
    _S.SEVERAL_PAGES: "several pages",
    _S.DEPTH_UNKNOWN: "16 bits of which at most 12 are used, or more than data.bits",
    _S.TOO_MANY_SCANS: "too many scans",
    _S.PATH_WITHOUT_FILE: "a path without bytes, and no such file below the source",
    _S.HEIC_WITHOUT_PLUGIN: "HEIC, without its plug-in",
    _S.JXL_WITHOUT_PLUGIN: "JPEG XL, without its plug-in",
    _S.OTHER_FORMAT: "unsupported format",
    **{status: f"unsupported format {status.name}" for status in (_S.EPS, _S.PDF, _S.SVG, _S.PSD, _S.DICOM)},
    _S.CAMERA_RAW: "unsupported format camera raw",
}

_REMEDIES: Final = {
    _S.TRUNCATED: "restore the files; what is broken for good can stay masked",
    _S.TOO_LARGE: "scale it down, or extract into a new cache with a larger data.max_pixels",
    _S.UNSUPPORTED_PIXELS: "write it with 8 bits, or 16 as unsigned integers, then extract into a new cache",
    _S.SEVERAL_BANDS: "write the three bands that teachers should see as an RGB image, then extract into a new cache",
    _S.SEVERAL_PAGES: "write each page as a file of its own, then extract into a new cache",
    _S.DEPTH_UNKNOWN: "extract into a new cache with data.bits, the number of bits that are used (16: all of them)",
    _S.TOO_MANY_SCANS: "write the JPEG anew (such a file costs minutes to decode), then extract into a new cache",
    _S.PATH_WITHOUT_FILE: (
        "put the images where the paths of the column lead, below the folder of the Parquet file, or write their bytes "
        "into it (datasets: embed_external_files), then extract into a new cache"
    ),
    _S.HEIC_WITHOUT_PLUGIN: "pip install 'kpu[heic]' (pillow-heif), then extract into a new cache",
    _S.JXL_WITHOUT_PLUGIN: "pip install 'kpu[jxl]' (pillow-jxl-plugin), then extract into a new cache",
    **dict.fromkeys((_S.EPS, _S.PDF, _S.SVG, _S.PSD, _S.DICOM, _S.CAMERA_RAW, _S.OTHER_FORMAT), _UNREAD_FORMAT),
}


def reason(code: int) -> str:
    """What a value of `images/status` means; also one of a later release."""
    try:
        status = ImageStatus(code)
    except ValueError:
        return f"reason {code} of a later release"
    return _TEXTS.get(status, status.name.lower().replace("_", " "))


def count_reasons(status: npt.NDArray[np.uint8]) -> dict[str, int]:
    """How many rows are masked for which reason, the most frequent first, by values of `images/status`, uint8 [n]."""
    codes, counts = np.unique(status[status != ImageStatus.OK], return_counts=True)
    pairs = sorted(zip(codes.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return {reason(code): count for code, count in pairs}


def describe_reasons(counts: dict[str, int]) -> str:
    """What `count_reasons` gave, in a line: how many rows, why, and what to do; empty if none is masked."""
    return "; ".join(f"{count:,} masked ({text})" + _after(remedy(text)) for text, count in counts.items())


def _after(advice: str | None) -> str:
    return "" if advice is None else f": {advice}"


_BY_TEXT: Final = {reason(status): text for status, text in _REMEDIES.items()}


def remedy(text: str) -> str | None:
    """What to do about rows that are masked for a reason, as `reason` gives it; None if there is nothing to say."""
    return _BY_TEXT.get(text)
