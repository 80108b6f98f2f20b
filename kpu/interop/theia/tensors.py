"""One sample's features as Theia keeps them: a safetensors file of `embedding` [C, H, W] and maybe `cls_token` [C]."""

import json
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from kpu.format.codecs import QuantGrid
from kpu.format.teacher import CodecSpec
from kpu.interop.theia.names import CLS_TOKEN, EMBEDDING

_DTYPES: Final[dict[str, str]] = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
_ALIGNED: Final = 8
_BF16: Final = QuantGrid(CodecSpec(name="bf16"), np.zeros(1, np.float32), np.ones(1, np.float32), np.zeros(1, np.int32))


class SampleFeatures(NamedTuple):
    """`embedding` float32 [C, H, W], `cls_token` float32 [C] or None; `dtype` as safetensors names the stored one."""

    embedding: npt.NDArray[np.float32]
    cls_token: npt.NDArray[np.float32] | None
    dtype: str


def dump_features(embedding: npt.NDArray[np.float32], cls_token: npt.NDArray[np.float32] | None) -> bytes:
    """The file, in bfloat16: rounded to nearest, ties to even, and clipped to its finite range.

    Written here, since NumPy has no such type and the library's own function for raw bytes changes between versions.
    """
    tensors = {EMBEDDING: embedding} if cls_token is None else {CLS_TOKEN: cls_token, EMBEDDING: embedding}
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, values in tensors.items():
        data = _BF16.encode(np.ascontiguousarray(values)).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def load_features(raw: bytes) -> SampleFeatures:
    """Parse one file; tensors of other names are left out.

    Raises:
        ValueError: it is no sound safetensors file, has no embedding, or a tensor of another rank, dtype or width.
    """
    try:
        tensors: dict[str, Any] = dict(deserialize(raw))  # type: ignore[no-untyped-call]
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"is not a sound safetensors file ({error})") from None
    if EMBEDDING not in tensors:
        raise ValueError(f"expected a tensor {EMBEDDING!r}, found {sorted(tensors)}")
    embedding = _take(tensors[EMBEDDING], EMBEDDING, 3)
    dtype = tensors[EMBEDDING]["dtype"]
    if CLS_TOKEN not in tensors:
        return SampleFeatures(embedding, None, dtype)
    cls_token = _take(tensors[CLS_TOKEN], CLS_TOKEN, 1)
    if tensors[CLS_TOKEN]["dtype"] != dtype:
        raise ValueError(f"{CLS_TOKEN}: expected {dtype} like {EMBEDDING}, found {tensors[CLS_TOKEN]['dtype']}")
    return SampleFeatures(embedding, cls_token, dtype)


def _take(tensor: dict[str, Any], name: str, rank: int) -> npt.NDArray[np.float32]:
    shape, dtype = tuple(tensor["shape"]), tensor["dtype"]
    if len(shape) != rank or 0 in shape or dtype not in _DTYPES:
        raise ValueError(f"{name}: expected {rank} dimensions of {' or '.join(_DTYPES)}, found {dtype}{list(shape)}")
    stored = np.frombuffer(tensor["data"], _DTYPES[dtype]).reshape(shape)
    return _BF16.decode(stored) if dtype == "BF16" else stored.astype(np.float32)
