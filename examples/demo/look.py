"""Read the demo's cache twice, with KPU's reader and with plain Zarr, and name digits from the cached features alone.

Usage: python examples/demo/look.py [CACHE]
"""

import argparse
import warnings

import numpy as np
import zarr

from kpu import open_cache

FIRST_TEST_IMAGE = 1297  # train_teachers.py never saw the images from this number on
ROWS_SHOWN = 64


def look_with_zarr(path: str) -> None:
    """List every teacher's arrays as any Zarr reader sees them, and turn some integers back into features."""
    warnings.filterwarnings("ignore", "Object at", zarr.errors.ZarrUserWarning)  # commits and statistics lie beside
    teachers = zarr.open_group(path, mode="r")["teachers"]
    reader = open_cache(path)
    for teacher, group in sorted(teachers.groups()):
        for output, array in sorted(group.arrays()):
            grid = array.attrs["kpu"]
            stored = array[:ROWS_SHOWN].astype(np.float32)
            features = np.float32(grid["centre"]) + np.float32(grid["scale"]) * stored
            difference = np.abs(features - reader.read(teacher, output, slice(0, ROWS_SHOWN))).max()
            print(
                f"  {teacher + '/' + output:<14} {array.shape!s:<18} {array.dtype}, "
                f"step {grid['step']} of a standard deviation, differs from KPU's reader by {difference:.1g}"
            )


def name_digits(path: str) -> None:
    """Apply each specialist's own head to its cached `global` features of the test images."""
    reader = open_cache(path)
    samples = reader.samples.to_table(columns=["key", "label"])
    numbers = np.array([int(key.rpartition("/")[2].removesuffix(".png")) for key in samples["key"].to_pylist()])
    rows = np.flatnonzero((numbers >= FIRST_TEST_IMAGE) & reader.valid())
    digits = samples["label"].to_numpy()[rows]
    scores = np.full((len(rows), 10), -np.inf)
    for name in ("low", "high"):
        teacher = reader.teachers[name]
        weight, bias = teacher.head
        logits = reader.read(name, "global", rows) @ weight.T + bias
        log_probability = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        labels = np.array(teacher.spec.labels)  # -1 where an output stands for no digit
        expected = np.where(np.isin(digits, labels), digits, -1)
        accuracy = np.mean(labels[logits.argmax(axis=1)] == expected)
        print(f"  {name:<5} names its five digits or 'other': {accuracy:.1%} of {len(rows)} test images right")
        scores[:, labels[labels >= 0]] = log_probability[:, labels >= 0]
    print(f"  both  together name any digit: {np.mean(scores.argmax(axis=1) == digits):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", nargs="?", default="build/demo/digits.kpu")
    path = parser.parse_args().cache
    print("As plain Zarr:")
    look_with_zarr(path)
    print("From cached features, without an image or a teacher:")
    name_digits(path)


if __name__ == "__main__":
    main()
