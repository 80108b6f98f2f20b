"""What decides whether two teachers are the same model."""

import pytest

from cache.teachers import list_differences
from tests.cache.builders import teacher_spec


@pytest.mark.parametrize("model", ["torch:{}/vit.py:make", "hf:{}/vit", "timm:local-dir:{}/vit"])
def test_a_model_is_the_same_wherever_its_folder_lies(model: str) -> None:
    here, there = (teacher_spec("beta", model=model.format(folder)) for folder in ("/old", "/new"))
    assert here.model_fingerprint == there.model_fingerprint
    assert list_differences(here, there) == []
