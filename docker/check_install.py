"""Check an installed KPU: its import names are its own, and torch and torchvision are a pair.

The packages have plain names (`pipeline`, `trainer`, `cli`), which another distribution could install too
and so shadow ours. Run it with the interpreter of the environment to check; it exits with 1 and says what is wrong.
"""

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "kpu"
NAMES = ("kpu", "pipeline", "trainer", "cli")


def linked_checkout(installed: Distribution) -> Path | None:
    """The checkout that an editable install points to; None for an installed copy."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path))


def name_problems(installed: Distribution) -> list[str]:
    """One line for each import name that is not this distribution's alone."""
    checkout = linked_checkout(installed)
    # An editable install records a link and no packages, so the metadata must know no owner of the names at all.
    expected = [DISTRIBUTION] if checkout is None else []
    owners = packages_distributions()
    problems = []
    for name in NAMES:
        found = sorted(set(owners.get(name, [])))
        if found != expected:
            problems.append(f"import name {name!r}: expected it from {DISTRIBUTION!r} alone, found it in {found}")
            continue
        spec = find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
        root = checkout or Path(str(installed.locate_file("")))
        if origin is None or not origin.resolve().is_relative_to(root.resolve() / name):
            problems.append(f"import name {name!r}: expected it below {root}, found {origin}")
    return problems


def torch_problems() -> list[str]:
    """One line if torchvision does not load beside this torch: the two must be built for each other."""
    try:
        import torch
        import torchvision
    except (ImportError, OSError, RuntimeError) as error:
        return [f"torch and torchvision do not import together: {error}"]
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    return []


def main() -> int:
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        problems = [f"distribution {DISTRIBUTION!r} is not installed in {sys.prefix}: run docker/install.sh"]
    else:
        problems = name_problems(installed) + torch_problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{', '.join(NAMES)}: from {DISTRIBUTION} {installed.version} alone")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
