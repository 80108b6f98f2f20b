"""KPU's packages are found beside it, and those of the same names elsewhere are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from kpu.own_packages import PACKAGES, ROOT


def run(code: str, *path: Path) -> "subprocess.CompletedProcess[str]":
    code = f"import sys\nsys.path[:0] = {[str(each) for each in path]!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT, check=False)


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    for name in (*PACKAGES, "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    return tmp_path


@pytest.mark.parametrize("name", PACKAGES)
def test_own_packages_come_first(strangers: Path, name: str) -> None:
    code = f"from kpu.own_packages import *\nfind_own_packages_first()\nimport {name}\nprint({name}.__file__)"
    done = run(code, strangers)
    assert done.stdout.strip() == str(ROOT / name / "__init__.py"), done.stderr


def test_ray_workers_look_into_the_drivers_directory_last(strangers: Path) -> None:
    (strangers / "mine.py").write_text("")
    code = (
        "from kpu.own_packages import *\nprepare_ray_worker()\n"
        f"sys.path.insert(0, {str(strangers)!r})\nimport mine, trainer, torch\nprint(torch.__version__)"
    )
    done = run(code)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_a_stranger_that_was_imported_before_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("")
    done = run("import trainer, kpu\nkpu.load_student", tmp_path)
    assert "ImportError: import name 'trainer': expected KPU's package" in done.stderr
    assert "use KPU in a process of its own" in done.stderr


def test_the_public_face_loads_neither_torch_nor_ray_nor_commit() -> None:
    code = (
        "import kpu\nkpu.open_cache, kpu.Cache, kpu.KpuError, kpu.__version__\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'ray') or 'kpu.commit' in name])"
    )
    assert run(code).stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    import kpu

    assert all(getattr(kpu, name) is not None for name in kpu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'; expected one of Cache, "):
        kpu.nonsense  # noqa: B018
