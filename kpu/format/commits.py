"""What commit records say of a unit."""

from enum import IntEnum

from kpu.format.base import Count, Frozen


class ImageStatus(IntEnum):
    """What decoding found in a row, as stored in `images/status`. Every value but OK masks the row in all teachers."""

    OK = 0
    EMPTY = 1  # zero bytes, or no bytes at all
    NOT_AN_IMAGE = 2  # no decoder recognises it
    TRUNCATED = 3  # recognised, but the pixel data ends early or is broken
    TOO_LARGE = 4  # more pixels than `data.max_pixels`
    UNSUPPORTED_PIXELS = 5  # a depth, sample format or compression that is not decoded, or not rightly
    SEVERAL_BANDS = 6  # more channels than colours and alpha
    SEVERAL_PAGES = 7  # a TIFF of several images
    DEPTH_UNKNOWN = 8  # 16 bits of which it is not known how many are used
    TOO_MANY_SCANS = 9  # a JPEG that takes more passes than any encoder writes
    PATH_WITHOUT_FILE = 10  # a path in place of bytes, and no such file beside it
    HEIC_WITHOUT_PLUGIN = 11
    JXL_WITHOUT_PLUGIN = 12
    CAMERA_RAW = 13
    EPS = 14
    PDF = 15
    SVG = 16
    PSD = 17
    DICOM = 18
    OTHER_FORMAT = 19  # another image format that is known by its signature and not decoded
    NOT_WRITTEN = 255  # the fill value


class Fidelity(Frozen):
    """Stored against unquantised features of one unit's valid rows, in channel standard deviations.

    `rmse` over all values; `cosine` the mean over tokens, of standardised features; `worst_row` the row with the
    largest RMSE, `worst_rmse` that RMSE; `saturated` the number of values outside the integer range.
    """

    rmse: float
    cosine: float
    worst_row: Count
    worst_rmse: float
    saturated: Count


class ShardRecord(Frozen):
    """Size and seal of one published shard."""

    bytes: Count
    seal: str


class OutputRecord(ShardRecord):
    """A teacher's shard with what storing it cost in precision; no fidelity where no row is valid."""

    fidelity: Fidelity | None


class ImagesRecord(Frozen):
    """`images/commits/<unit>.json`."""

    unit: int
    plan: str
    row_digest: str
    masked: Count
    masked_digest: str
    arrays: dict[str, ShardRecord]


class UnitRecord(Frozen):
    """`teachers/<teacher>/commits/<unit>.json`: a function of the content alone.

    `files` digests the raw bytes of the teacher's `zarr.json`, which digests its other files. `nonfinite`
    is a hexadecimal bit map over the unit's rows (first row = highest bit of the first digit) of rows that this
    teacher alone masks, empty if there is none.
    """

    unit: int
    plan: str
    row_digest: str
    teacher: str
    fingerprint: str
    files: dict[str, str]
    masked: Count
    masked_digest: str
    nonfinite: str = ""
    outputs: dict[str, OutputRecord]
