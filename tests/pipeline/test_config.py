"""The configuration file, the flags laid over it, and what a wrong key gets."""

from pathlib import Path

import pytest

from kpu.errors import ConfigError
from kpu.format.teacher import CodecSpec
from pipeline.config import ExtractConfig, load_config, validate_config

MINIMAL = {"data": {"source": "images"}, "out": "my.kpu", "teachers": {"dino": {"model": "timm:vit_tiny_patch16_224"}}}


def test_flags_and_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"data: {{source: {tmp_path}/images}}\nout: {tmp_path}/my.kpu\n"
        "teachers:\n  dino: {model: 'timm:vit_tiny_patch16_224'}\n"
        "codec: {name: uniform, step: 0.1}\nexecutor: {batch_size: 8}\n"
    )
    flags = load_config(
        data=f"{tmp_path}/images",
        teachers=["dino=timm:vit_tiny_patch16_224"],
        out=f"{tmp_path}/my.kpu",
        overrides=["codec.step=0.1", "executor.batch_size=8"],
    )
    assert load_config(file) == flags
    assert flags.codec == CodecSpec(name="uniform", step=0.1)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {source: images}\nout: a.kpu\nteachers: {dino: {model: 'timm:a', weights: random}}\n")
    config = load_config(file, out="b.kpu", executor="ray", teachers=["dino=timm:b"])
    assert (config.out, config.executor.kind) == ("b.kpu", "ray")
    assert (config.teachers["dino"].model, config.teachers["dino"].weights) == ("timm:b", "random")


def test_resolved_configuration_validates_again() -> None:
    config = validate_config(MINIMAL, "test")
    assert ExtractConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_teacher_may_have_its_own_codec() -> None:
    config = load_config(
        data="images", out="my.kpu", teachers=["a=timm:x", "b=timm:y"], overrides=["teachers.a.codec.name=fp32"]
    )
    assert config.codec_of("a") == CodecSpec(name="fp32")
    assert config.codec_of("b") == CodecSpec(name="uniform", step=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codec.stp=1", "unknown key 'codec.stp'; did you mean 'step'?"),
        ("teachers.dino.input.sizes=3", "unknown key 'teachers.dino.input.sizes'; did you mean 'size'?"),
        ("veiws=2", "unknown key 'veiws'; did you mean 'views'?"),
        ("unit_rows=100", "unit_rows: expected a power of two from 64 to 4096, found 100"),
        ("views=0", "views: expected a whole number above 0, found 0"),
        ("codec.name=int8", "codec.name: expected 'uniform', 'rotated', 'fp32', 'fp16' or 'bf16', found 'int8'"),
        ("codec={name: fp32, step: 0.1}", "step is only for uniform and rotated"),
        ("teachers.dino.model=resnet50", "teachers.dino.model: expected timm:<model>"),
        ("teachers.dino.outputs=[]", "expected at least one of outputs and layers"),
        ("teachers.Dino.model='timm:x'", "teacher name 'Dino': expected lower-case letters"),
        ("teachers.runs.model='timm:x'", "teacher name 'runs'"),
        ("executor=ray", "executor: "),
        ("data.limit=[", "--set data.limit=[: the value is not YAML"),
        ("noequals", "--set 'noequals': expected KEY=VALUE"),
    ],
)
def test_wrong_keys_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(data="images", out="my.kpu", teachers=["dino=timm:vit"], overrides=[override])
    assert message in str(error.value)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(data="images")
    assert "out: is required" in str(error.value)
    assert "teachers: is required" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("[1]", "expected a mapping"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "override", "begins"),
    [
        ("views: 2", "unit_rows=100", "--set unit_rows=100: unit_rows: expected a power of two"),
        ("views: 0", "seed=1", "{file}: views: expected a whole number above 0"),
        ("views: 0", "unit_rows=100", "{file} with --set unit_rows=100: "),
    ],
)
def test_what_is_wrong_is_looked_for_where_it_is(tmp_path: Path, text: str, override: str, begins: str) -> None:
    file = tmp_path / "extract.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, data="images", out="my.kpu", teachers=["dino=timm:vit"], overrides=[override])
    assert str(error.value).startswith(begins.format(file=file))
