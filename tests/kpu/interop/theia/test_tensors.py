"""Features of one sample as a safetensors file in bfloat16."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from kpu.interop.theia.tensors import dump_features, load_features

RNG = np.random.default_rng(0)
EMBEDDING = (RNG.standard_normal((5, 2, 3)) * 1e3).astype(np.float32)
VECTOR = RNG.standard_normal(5).astype(np.float32)


@pytest.mark.parametrize("vector", [VECTOR, None])
def test_the_library_reads_what_is_written(vector: np.ndarray | None) -> None:
    found = load(dump_features(EMBEDDING, vector))
    expected = {"embedding": EMBEDDING} | ({} if vector is None else {"cls_token": vector})
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.equal(found[name], torch.from_numpy(values).bfloat16())


def test_the_bytes_are_those_of_the_library() -> None:
    tensors = {"embedding": torch.from_numpy(EMBEDDING).bfloat16(), "cls_token": torch.from_numpy(VECTOR).bfloat16()}
    assert dump_features(EMBEDDING, VECTOR) == save(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_read_back(dtype: torch.dtype) -> None:
    tensors = {"embedding": torch.from_numpy(EMBEDDING).to(dtype), "cls_token": torch.from_numpy(VECTOR).to(dtype)}
    found = load_features(save({**tensors, "pooled_cls_token": torch.zeros(2)}))
    np.testing.assert_array_equal(found.embedding, tensors["embedding"].float().numpy())
    assert found.cls_token is not None
    np.testing.assert_array_equal(found.cls_token, tensors["cls_token"].float().numpy())


def test_what_is_not_sound_is_refused() -> None:
    whole = dump_features(EMBEDDING, VECTOR)
    cases = {
        "not a sound safetensors file": whole[:-1],
        "expected a tensor 'embedding'": save({"cls_token": torch.zeros(3)}),
        "embedding: expected 3 dimensions": save({"embedding": torch.zeros(3, 4)}),
        "cls_token: expected 1 dimensions": save({"embedding": torch.zeros(3, 2, 2), "cls_token": torch.zeros(1, 3)}),
        "found I64": save({"embedding": torch.zeros(3, 2, 2, dtype=torch.int64)}),
        "expected F32 like embedding": save(
            {"embedding": torch.zeros(3, 2, 2), "cls_token": torch.zeros(3, dtype=torch.float16)}
        ),
    }
    for reason, raw in cases.items():
        with pytest.raises(ValueError, match=reason):
            load_features(raw)
    with pytest.raises(ValueError, match="not a sound"):
        load_features(b"")
