"""The install check catches foreign owners of the import names, and the manifests follow the pinned versions."""

import importlib.util
import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import kpu

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def _check_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", DOCKER / "check_install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.partition(";")[0].strip().split("==") for line in lines)


def test_import_names_are_this_distributions_alone() -> None:
    assert _check_install().name_problems(distribution("kpu")) == []


def test_a_foreign_distribution_with_one_of_the_names_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "rival-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("trainer\n")
    monkeypatch.syspath_prepend(tmp_path)
    problems = _check_install().name_problems(distribution("kpu"))
    assert len(problems) == 1
    assert "'trainer'" in problems[0] and "rival" in problems[0]


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {_normal(re.split(r"[\[<>=~!; ]", line)[0]) for line in wanted} - {"kpu"}
    assert names <= {_normal(name) for name in _pins()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_manifests_name_the_pinned_ray_and_this_version_of_the_image() -> None:
    version = kpu.__version__
    image = f"kpu:{version}"
    job = next(
        item for item in yaml.safe_load_all((DOCKER / "kuberay-job.yaml").read_text()) if item["kind"] == "RayJob"
    )
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == _pins()["ray"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups} == {image}
    launcher = yaml.safe_load((DOCKER / "ray-cluster.yaml").read_text())
    assert launcher["docker"]["image"] == image
    assert launcher["max_workers"] == len(launcher["provider"]["worker_ips"])


def test_the_jobs_configuration_is_one_that_extract_takes() -> None:
    from pipeline.config import validate_config

    documents = list(yaml.safe_load_all((DOCKER / "kuberay-job.yaml").read_text()))
    text = next(item for item in documents if item["kind"] == "ConfigMap")["data"]["extract.yaml"]
    config = validate_config(yaml.safe_load(text), "extract.yaml")
    assert config.executor.kind == "ray"
