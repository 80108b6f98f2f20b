"""What a run checks of its teachers before it writes: here, that their labels are classes of the data."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.toys import assert_refused, kpu, kpu_json, write_images, write_teacher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("labels")
    for name in ("cats", "dogs"):
        write_images(place / "images" / name, 35)
    write_teacher(place)
    pictures = [path.read_bytes() for path in sorted((place / "images").glob("*/*.png"))]
    pq.write_table(pa.table({"image": pictures, "label": [row % 2 for row in range(70)]}), place / "images.parquet")
    return place


def extraction(place: Path, images: str | Path, labels: str, out: Path) -> list[object]:
    teacher = f"t=torch:{place / 'toy.py'}:toy"
    return ["extract", place / images, "-t", teacher, "--set", f"teachers.t.labels={labels}", "-o", out]


@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["extract", "dry-run"])
@pytest.mark.parametrize(("labels", "found"), [("[0, 5, 2]", "found 2, 5"), ("[0, 1, -2]", "found -2")])
def test_a_label_that_is_no_class_of_the_data(
    place: Path, tmp_path: Path, labels: str, found: str, mode: tuple[str, ...]
) -> None:
    result = kpu(*extraction(place, "images", labels, tmp_path / "o.kpu"), *mode)
    assert_refused(result, "teacher 't': labels", "from 0 to 1, the data's classes, or null", found)
    assert list(tmp_path.iterdir()) == []


def test_several_answers_may_stand_for_one_class(place: Path, tmp_path: Path) -> None:
    result = kpu(*extraction(place, "images", "[1, 1, null]", tmp_path / "o.kpu"))
    assert result.exit_code == 0, result.output
    assert kpu_json("info", tmp_path / "o.kpu")["teachers"]["t"]["labels"] == [1, 1, -1]


def test_data_without_class_names_may_lack_the_last_ones(place: Path, tmp_path: Path) -> None:
    result = kpu(*extraction(place, "images.parquet", "[0, 1, 2]", tmp_path / "o.kpu"))
    assert result.exit_code == 0, result.output
    warning = "warning: teacher 't': labels: expected numbers up to 1, the largest label in the data, found 2"
    assert warning in result.stderr
    fitting = kpu(*extraction(place, "images.parquet", "[0, 1, null]", tmp_path / "p.kpu"))
    assert "labels" not in fitting.stderr


def test_labels_may_be_names_of_classes(place: Path, tmp_path: Path) -> None:
    result = kpu(*extraction(place, "images", "[dogs, cats, null]", tmp_path / "o.kpu"))
    assert result.exit_code == 0, result.output
    assert kpu_json("info", tmp_path / "o.kpu")["teachers"]["t"]["labels"] == ["dogs", "cats", -1]
    assert "labels" not in result.stderr
    lacking = kpu(*extraction(place, "images", "[dogs, cows, null]", tmp_path / "p.kpu"))
    assert lacking.exit_code == 0, lacking.output
    warning = "warning: teacher 't': labels: expected names of the data's classes, 'cats', 'dogs', found 'cows'; that"
    assert warning in lacking.stderr


@pytest.mark.parametrize(
    ("images", "expected"),
    [("images", "names of the data's classes, 'cats', 'dogs', or null"), ("images.parquet", "the data names no class")],
)
def test_names_of_no_class_are_refused(place: Path, tmp_path: Path, images: str, expected: str) -> None:
    result = kpu(*extraction(place, images, "[dog, cow, null]", tmp_path / "o.kpu"))
    assert_refused(result, "teacher 't': labels", expected, "found 'dog', 'cow'")


def test_folders_named_by_numbers_in_another_order_are_warned_of(place: Path, tmp_path: Path) -> None:
    for name in ("0", "1", "2", "10"):
        write_images(tmp_path / "numbers" / name, 1)
    result = kpu("extract", tmp_path / "numbers", "-t", f"t=torch:{place}/toy.py:toy", "-o", tmp_path / "o.kpu")
    assert result.exit_code == 0, result.output
    assert "positions in the order of text: '10' has label 2, '2' has label 3; name them" in result.stderr
    (tmp_path / "numbers" / "10").rename(tmp_path / "numbers" / "3")
    plain = kpu("extract", tmp_path / "numbers", "-t", f"t=torch:{place}/toy.py:toy", "-o", tmp_path / "p.kpu")
    assert "order of text" not in plain.stderr


def test_numbers_that_mean_other_classes_than_in_the_lender_are_refused(place: Path, tmp_path: Path) -> None:
    """The test folder has a class that sorts before those of the training: names say the same in both."""
    assert kpu(*extraction(place, "images", "[0, 1, null]", tmp_path / "train.kpu")).exit_code == 0
    for name in ("apes", "dogs"):
        write_images(tmp_path / "test" / name, 2)
    borrowing = ("--set", f"calibration_from={tmp_path}/train.kpu")
    refused = kpu(*extraction(place, tmp_path / "test", "[0, 1, null]", tmp_path / "test.kpu"), *borrowing)
    assert_refused(
        refused,
        "teacher 't': labels: expected output 0 to mean class 'cats'",
        "found 'apes'",
        "labels: ['cats', 'dogs', null]",
    )
    named = kpu(*extraction(place, tmp_path / "test", "[cats, dogs, null]", tmp_path / "test.kpu"), *borrowing)
    assert named.exit_code == 0, named.output
    assert kpu_json("info", tmp_path / "test.kpu")["teachers"]["t"]["labels"] == ["cats", "dogs", -1]
