"""What decides whether two teachers are the same model."""

import pytest

from kpu.commit.teacher import list_differences
from kpu.format.teacher import InputSpec
from tests.support.builders import teacher_spec


@pytest.mark.parametrize("model", ["torch:{}/vit.py:make", "hf:{}/vit", "timm:local-dir:{}/vit"])
def test_a_model_is_the_same_wherever_its_folder_lies(model: str) -> None:
    here, there = (teacher_spec("beta", model=model.format(folder)) for folder in ("/old", "/new"))
    assert here.model_fingerprint == there.model_fingerprint
    assert list_differences(here, there) == []


def test_what_earlier_inputs_could_not_say_is_left_out_unless_it_is_said() -> None:
    """Else the fingerprints of earlier caches would change."""
    plain = InputSpec(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    written = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.2] * 3}
    written |= {"interpolation": "bicubic", "crop": 1.0, "crop_mode": "center"}
    assert plain.model_dump(mode="json") == written
    said = plain.model_copy(update={"crop_rounding": "floor", "channels": "bgr"})
    assert said.model_dump(mode="json") == written | {"crop_rounding": "floor", "channels": "bgr"}
    for each in (plain, said):
        assert InputSpec.model_validate_json(each.model_dump_json()) == each
    one, other = (teacher_spec("beta", input=each) for each in (plain, said))
    assert one.model_dump(mode="json")["input"] == written
    rounding, order = (
        'input.crop_rounding: expected "round", found "floor"',
        'input.channels: expected "rgb", found "bgr"',
    )
    assert list_differences(one, other) == [rounding, order]
    assert one.model_fingerprint != other.model_fingerprint


def test_words_on_pooling_and_order_change_no_fingerprint_but_a_chosen_pool_does() -> None:
    plain = teacher_spec("beta")
    assert not {"pool", "pooling", "unproven"} & plain.model_dump(mode="json").keys()
    told = plain.model_copy(update={"pooling": "class token", "unproven": ("patch",)})
    assert told.model_fingerprint == plain.model_fingerprint
    assert list_differences(plain, told) == []
    assert type(told).model_validate_json(told.model_dump_json()) == told
    chosen = plain.model_copy(update={"pool": "mean"})
    assert chosen.model_fingerprint != plain.model_fingerprint
    assert list_differences(plain, chosen)
