"""How others store features, as `codecs.py` and `students.py` compare them with the project's codecs."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numcodecs
import numpy as np
import numpy.typing as npt
import torch

from kpu.format.codecs import make_grid
from kpu.format.statistics import F32, Statistics
from kpu.format.teacher import CodecSpec
from kpu.shards.chunk import CRC_BYTES, crc, decode_chunk, encode_chunk

Stored = npt.NDArray[Any]
VECTORS: Final = 64  # rows in a chunk of vectors


@dataclass(frozen=True)
class Codec:
    """`store` and `restore` take whole arrays [n, ...]; `pack` and `unpack` one chunk, and are what is timed."""

    name: str
    store: Callable[[F32], Stored]
    restore: Callable[[Stored], F32]
    pack: Callable[[Stored], bytes]
    unpack: Callable[[bytes, Stored], Stored]  # the bytes, and an array of the chunk's shape that may be written to


def peers(statistics: Statistics) -> Iterator[Codec]:
    """What others do."""
    centre, std = (each.astype(np.float32) for each in (statistics.centre, statistics.std))

    def standardise(x: F32) -> F32:
        return (x - centre) / std

    def restore(values: Stored) -> F32:
        return (values.astype(np.float32) * std + centre).astype(np.float32)

    def per_token(x: F32) -> Stored:
        u = standardise(x)
        scale = np.maximum(np.abs(u).max(-1, keepdims=True) / 127, 1e-7).astype(np.float16)
        values = np.clip(np.rint(u / scale.astype(np.float32)), -127, 127).astype(np.int8)
        return np.concatenate([values.view(np.uint8), scale.view(np.uint8)], axis=-1)

    def from_per_token(stored: Stored) -> F32:
        scale = np.ascontiguousarray(stored[..., -2:]).view(np.float16).astype(np.float32)
        return restore(np.ascontiguousarray(stored[..., :-2]).view(np.int8) * scale)

    def to_fp8(x: F32) -> Stored:
        values = torch.from_numpy(np.clip(standardise(x), -448, 448)).to(torch.float8_e4m3fn)
        return values.view(torch.uint8).numpy()

    def from_fp8(stored: Stored) -> F32:
        return restore(torch.from_numpy(stored).view(torch.float8_e4m3fn).float().numpy())

    compressed = _summed(numcodecs.Zstd(level=3))
    yield Codec("fp16 + zstd", lambda x: x.astype(np.float16), lambda v: v.astype(np.float32), *compressed)
    yield Codec("int8 per token + zstd", per_token, from_per_token, *compressed)
    yield Codec("fp8 e4m3", to_fp8, from_fp8, functools.partial(encode_chunk, packing="plain"), _plain)
    yield Codec("fp8 e4m3 + zstd", to_fp8, from_fp8, *compressed)
    if hasattr(numcodecs, "ZFPY"):
        for tolerance in (0.125, 0.5):  # it rounds to powers of two, and stays well below
            zfp = numcodecs.ZFPY(mode=4, tolerance=tolerance)
            yield Codec(f"ZFP {tolerance}", standardise, restore, *_summed(zfp))
    if hasattr(numcodecs, "PCodec"):
        grid, pcodec = make_grid(CodecSpec(name="uniform", step=0.05), statistics), numcodecs.PCodec(level=8)
        yield Codec("uniform 0.05, PCodec", grid.encode, grid.decode, *_summed(pcodec))


def chunks_of(stored: Stored) -> list[Stored]:
    """Whole chunks only."""
    if stored.ndim == 3:
        return [np.ascontiguousarray(row) for row in stored]
    return [np.ascontiguousarray(stored[at : at + VECTORS]) for at in range(0, len(stored) - VECTORS + 1, VECTORS)]


def _plain(raw: bytes, out: Stored) -> Stored:
    decode_chunk(raw, out, "plain")
    return out


def _summed(codec: Any) -> tuple[Callable[[Stored], bytes], Callable[[bytes, Stored], Stored]]:
    """Pack and unpack of a numcodecs codec, with a checksum behind."""

    def pack(chunk: Stored) -> bytes:
        data = bytes(codec.encode(chunk))
        return data + crc(data)

    return pack, lambda raw, out: np.asarray(codec.decode(raw[:-CRC_BYTES], out))
