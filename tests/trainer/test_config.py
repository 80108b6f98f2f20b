"""The configuration of a training: the file, the flags laid over it, and what a wrong key gets."""

from pathlib import Path

import pytest

from kpu.errors import ConfigError
from trainer.config import TrainConfig, load_config, validate_config

MINIMAL = {"caches": ["a.kpu"], "base": "dino"}

WHOLE = """
caches: [a.kpu, s3://bucket/b.kpu]
base: dino
teachers: [dino, clip]
outputs: [global]
student: {kind: parallel, model: "timm:vit_tiny_patch16_224", weights: random, merge: add, width: 64, depth: 1}
targets: {source: live, normalize: phi-s}
projector: {hidden: 512, norm: true}
loss: {cosine: 0.9, smooth_l1: 0.1, mse: 0.2}
unify: {mode: pretrained, weight: 0.5, hidden: 128, steps: 100, pca_rows: 1000, reconstruction: 2, variance: 0.5,
  covariance: 0.01, lowest_std: 0.2, lowest_rank: 0.1, lowest_reconstruction: -1}
preserve: {weight: 0.1}
balance: {name: dropping, p: 0.25}
optim: {name: adamw, lr: 3e-4, weight_decay: 0, epochs: 3, warmup: 0.1, clip: 0, ema: 1000, accumulate: 2}
batch_size: 128
keep: last
validate_every: 100
patience: 5
order: {name: windowed, window: 8}
validation: 0.1
seed: 7
workers: 4
images: {root: /data/images}
loader: {threads: 3, ahead: 2, memory: 1000000}
log: {every: 5, checkpoint: 50}
device: cpu
precision: bf16
threads: 2
compile: true
"""


def write(folder: Path, text: str = "caches: [a.kpu]\nbase: dino\n") -> Path:
    file = folder / "train.yaml"
    file.write_text(text)
    return file


def test_every_key_of_a_whole_file_is_taken(tmp_path: Path) -> None:
    """No value of `WHOLE` is a default, so a key that were passed over would show; `layers` go with another kind."""
    config = load_config(write(tmp_path, WHOLE))
    default = validate_config(MINIMAL, "test").model_dump()
    for name, value in config.model_dump().items():
        if name != "base":
            assert value != default[name], name
        if isinstance(value, dict):
            assert [key for key in value if value[key] == default[name][key]] == ["layers"] * (name == "student"), name
    assert config.caches == (f"{tmp_path}/a.kpu", "s3://bucket/b.kpu")
    assert config.optim.lr == 3e-4  # which YAML takes for a text
    assert config.unify.lowest_reconstruction == -1


def test_resolved_configuration_validates_again(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, WHOLE))
    assert validate_config(config.model_dump(mode="json"), "test") == config


def test_caches_of_the_command_line_stand_in_for_the_files(tmp_path: Path) -> None:
    file = write(tmp_path)
    assert load_config(file).caches == (f"{tmp_path}/a.kpu",)
    assert load_config(file, caches=["b.kpu", "c.kpu"]).caches == ("b.kpu", "c.kpu")
    assert load_config(write(tmp_path, "base: dino\n"), caches=["b.kpu"]).caches == ("b.kpu",)


def test_flags_alone_are_enough() -> None:
    assert load_config(None, caches=["a.kpu"], overrides=["base=dino"]) == validate_config(MINIMAL, "test")
    with pytest.raises(ConfigError, match="command line: base: is required"):
        load_config(None, caches=["a.kpu"])


def test_overrides_win_over_everything(tmp_path: Path) -> None:
    overrides = ["caches=[c.kpu]", "optim.lr=1e-2", "loss={mse: 1, cosine: 0, smooth_l1: 0}", "optim.epochs=1"]
    config = load_config(write(tmp_path), caches=["b.kpu"], overrides=overrides)
    assert config.caches == ("c.kpu",)
    assert (config.optim.lr, config.optim.epochs, config.optim.weight_decay) == (0.01, 1, 0.05)
    assert (config.loss.mse, config.loss.cosine) == (1, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("studnet.kind=side", "unknown key 'studnet'; did you mean 'student'?"),
        ("zzz=1", "unknown key 'zzz'; expected one of balance, base, batch_size"),
        ("batch_size=0", "batch_size: expected a whole number above 0, found 0"),
        ("optim.lr=fast", "optim.lr: expected a number above 0, or auto, found 'fast'"),
        ("optim.warmup=1.5", "optim.warmup: expected a number from 0 to 1, found 1.5"),
        ("validation=1", "validation: expected a number from 0, below 1, found 1"),
        ("caches=a.kpu", "caches: expected a list of at least one cache, found 'a.kpu'"),
        ("caches=[]", "caches: expected a list of at least one cache, found []"),
        ("teachers=[dino, dino]", "teachers: expected each name once, found ['dino', 'dino']"),
        ("student.kind=whole", "student.kind: expected side, parallel, full or frozen, found 'whole'"),
        ("student.model=timm:x", "student: expected no model with kind side, found 'timm:x'; remove it"),
        ("student.weights=random", "student: expected no weights with kind side, found 'random'; remove it"),
        ("student={kind: frozen, weights: a.pth}", "student: expected no weights with kind frozen, found 'a.pth'"),
        (
            "student={kind: parallel, layers: [layer1.patch]}",
            "student: expected no layers with kind parallel, found ['layer1.patch']; remove them",
        ),
        ("student.kind=full", "student: expected a model with kind full, found null; give timm:<model>"),
        (
            "outputs=[layer2.patch]",
            "outputs: expected a list of global and patch, or of one of them, found ['layer2.patch']",
        ),
        (
            "optim.ema=0.999",
            "optim.ema: expected a half-life in rows, 0 for none, found 0.999; give a number of rows such as 100000, "
            "not a decay",
        ),
        ("loss={cosine: 0, smooth_l1: 0}", "loss: expected at least one weight above 0, found none"),
        ("order=full", "order: expected a mapping of name, window, found 'full'"),
        ("workers=3", "expected a batch_size that 3 workers share evenly, found 256"),
        ("preserve.weight=1", "expected preserve.weight 0 with student.merge concat, which keeps the base as it is"),
        ("seed=-1", "seed: expected a whole number from 0 to 2**63 - 1, found -1"),
        ("images.root=[", "--set images.root=[: the value is not YAML"),
        ("optim", "--set 'optim': expected KEY=VALUE"),
        ("base.name=x", "base: expected a mapping of keys, found 'dino'"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path), overrides=[override])
    assert message in str(error.value)
    assert "train.yaml" not in str(error.value)


def test_the_flag_that_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set optim\.lr=-1: optim\.lr: expected a number above 0"):
        load_config(write(tmp_path), overrides=["seed=3", "optim.lr=-1"])
    file = write(tmp_path, "caches: [a.kpu]\nbase: dino\nbacth_size: 3\n")
    with pytest.raises(ConfigError, match=r"^\S+/train\.yaml with --set seed=-1: seed: expected .*'bacth_size'"):
        load_config(file, overrides=["seed=-1"])
    with pytest.raises(ConfigError, match=r"^\S+/train\.yaml: unknown key 'bacth_size'"):
        load_config(file, overrides=["seed=1"])


def test_layers_go_with_a_side_student_and_a_half_life_may_be_one_row(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), overrides=["student.layers=[layer3.patch]", "optim.ema=1"])
    assert config.student.layers == ("layer3.patch",)
    assert config.optim.ema == 1


def test_the_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, "caches: [a.kpu]\nbase: dino\nbacth_size: 3\n")
    with pytest.raises(ConfigError, match=r"train\.yaml: unknown key 'bacth_size'; did you mean 'batch_size'\?"):
        load_config(file)


def test_a_complaint_about_the_whole_follows_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "caches: [a.kpu]\nbase: dino\nworkers: 3\n")
    with pytest.raises(ConfigError, match=r"train\.yaml: expected a batch_size"):
        load_config(file)


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, ""))
    assert "caches: is required and was not given; give --cache PATH or caches" in str(error.value)
    assert "base: is required and was not given" in str(error.value)


def test_the_defaults_are_valid() -> None:
    assert TrainConfig.model_validate(MINIMAL) == validate_config(MINIMAL, "test")
