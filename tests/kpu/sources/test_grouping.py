"""Which members of a tar are a sample, its image and its label; nothing is lost without being counted."""

from pathlib import Path

import pytest

from kpu.errors import SourceError
from tests.support.sources import contents, left_out, listing, pack


def labels(path: object, **options: object) -> dict[str, int | None]:
    table = listing(path, **options)
    return dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_hidden_members_do_not_part_a_sample(tmp_path: Path) -> None:
    members = []
    for number in range(3):
        for name in (f"{number}.cls", f"{number}.jpg"):
            members += [(f"./._{name}", b"\0\5\x16\7"), (f"./{name}", b"%d" % number)]
    path = pack(tmp_path / "s.tar", [*members, ("__MACOSX/0.jpg", b"no"), (".DS_Store", b"no")])
    assert labels(path) == {"s/./0": 0, "s/./1": 1, "s/./2": 2}
    assert contents(path) == {"s/./0": b"0", "s/./1": b"1", "s/./2": b"2"}
    assert left_out(path) == {"hidden": (8, "s.tar/./._0.cls")}


def test_image_and_label_follow_one_rule(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("1.0.jpg", b"I"), ("1.0.cls", b"4"), ("2.1.jpg", b"J"), ("2.cls", b"5")])
    assert labels(path) == {"s/1": 4, "s/2": 5}
    other = pack(tmp_path / "t.tar", [("1.0.jpg", b"I"), ("1.fine.cls", b"4"), ("2.jpg", b"J"), ("2.fine.cls", b"5")])
    assert labels(other) == {"t/1": None, "t/2": None}
    assert labels(other, label="fine.cls") == {"t/1": 4, "t/2": 5}
    twice = pack(tmp_path / "u.tar", [("1.0.jpg", b"I"), ("1.1.jpg", b"J")])
    with pytest.raises(SourceError, match=r"one image a sample, .*'1\.1\.jpg' .*the key of a sample ends at the first"):
        listing(twice)


def test_members_that_lie_apart_are_joined_by_key(tmp_path: Path) -> None:
    images = [(f"{number}.jpg", b"%d" % number) for number in range(3)]
    classes = [(f"{number}.cls", b"%d" % (7 + number)) for number in (2, 0)]
    for order in ([*images, *classes], [*classes, *images]):
        path = pack(tmp_path / "s.tar", [*order, ("9.cls", b"1")])
        assert labels(path) == {"s/0": 7, "s/1": None, "s/2": 9}
        assert left_out(path) == {"samples without an image": (1, "s.tar/9.cls")}
    masks = [(f"{number}.seg.png", b"mask") for number in range(3)]
    for order in ([*images, *masks], [*masks, *images]):
        path = pack(tmp_path / "s.tar", order)
        assert contents(path) == {f"s/{number}": b"%d" % number for number in range(3)}
    with pytest.raises(SourceError, match=r"sample '0': expected one label, found 7 and 8, apart"):
        listing(pack(tmp_path / "s.tar", [("0.jpg", b""), ("0.cls", b"7"), ("1.jpg", b""), ("0.cls", b"8")]))


def test_a_mask_is_not_taken_for_the_image(tmp_path: Path) -> None:
    members = [("0.jpg", b"0"), ("0.seg.png", b"m0"), ("1.seg.png", b"m1"), ("2.seg.png", b"m2"), ("2.jpg", b"2")]
    for order in (members, members[2:] + members[:2]):
        path = pack(tmp_path / "s.tar", order)
        assert contents(path) == {"s/0": b"0", "s/2": b"2"}
        assert left_out(path) == {
            "second images of a sample": (2, f"s.tar/{order[1][0] if order is members else '2.seg.png'}"),
            "samples with a .seg.png but no image": (1, "s.tar/1.seg.png"),
        }


def test_what_is_a_mask_in_one_tar_is_one_in_all(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", [("0.jpg", b"0"), ("0.seg.png", b"m0")])
    pack(tmp_path / "1.tar", [("1.seg.png", b"m1"), ("2.jpg", b"2"), ("3.v2.jpg", b"3")])
    assert contents(tmp_path) == {"0/0": b"0", "1/2": b"2", "1/3": b"3"}
    assert left_out(tmp_path)["samples with a .seg.png but no image"] == (1, "1.tar/1.seg.png")
    pack(tmp_path / "a" / "0.tar", [("1.seg.png", b"m1")])
    pack(tmp_path / "a" / "1.tar", [("0.jpg", b"0"), ("0.seg.png", b"m0")])
    with pytest.raises(
        SourceError, match=r"1\.tar: .*'0\.seg\.png' beside the image .* and '0\.tar/1\.seg\.png' as the"
    ):
        listing(tmp_path / "a")
    assert contents(tmp_path / "a", image="jpg;png") == {"1/0": b"0"}
    assert left_out(tmp_path / "a", image="jpg;png")["samples without an image"] == (1, "0.tar/1.seg.png")


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_links_within_the_tar_are_followed(tmp_path: Path, kind: str) -> None:
    long = "d" * 60 + "/" + "n" * 70
    path = pack(
        tmp_path / "s.tar",
        [
            ("later.jpg->a/b.jpg", b""),
            (f"{long}.jpg", b"long"),
            ("0.jpg", b"zero"),
            ("0.cls", b"5"),
            ("1.jpg=>0.jpg", b""),
            ("1.cls=>0.cls", b""),
            (f"2.jpg=>{long}.jpg", b""),
            ("a/b.jpg", b"b"),
            ("a/up.jpg->../0.jpg", b""),
            ("a/two.jpg->up.jpg", b""),
            ("a/round.jpg->round.jpg", b""),
            ("a/gone.jpg->/etc/passwd", b""),
        ],
        kind,
    )
    found = contents(path)
    assert {key.removeprefix("s/"): data for key, data in found.items()} == {
        "later": b"b", long: b"long", "0": b"zero", "1": b"zero", "2": b"long", "a/b": b"b", "a/up": b"zero",
        "a/two": b"zero",
    }  # fmt: skip
    assert labels(path)["s/1"] == 5
    assert left_out(path) == {"links to nothing in the tar": (2, "s.tar/a/round.jpg")}


def test_members_that_are_no_image_are_counted(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "s.tar", [("0.jpg", b"0"), ("1.psd", b"123"), ("1.cls", b"1"), ("readme", b""), ("2.npy", b"")]
    )
    assert left_out(path) == {
        "samples without an image": (2, "s.tar/1.psd"),
        "without an ending": (1, "s.tar/readme"),
    }
    with pytest.raises(SourceError, match=r"hold no member with an image extension .*; left out: 1 samples without an"):
        listing(pack(tmp_path / "t.tar", [("1.psd", b"123")]))


def test_labels_below_zero_are_none(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", [("0.jpg", b"0"), ("0.cls", b"-1")])
    assert labels(path) == {"s/0": -1}, "stored as it is"
    with pytest.raises(SourceError, match=r"\(data\.label\) beside an image"):
        listing(path, label="cls")
