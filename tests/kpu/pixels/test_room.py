"""Large images wait for each other where memory is short; what comes out never depends on it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from kpu.format.plan import Decoding
from kpu.pixels import room
from kpu.pixels.decode import Decoded, decode_image
from kpu.pixels.room import ALWAYS, BYTES_PER_PIXEL, Claim
from tests.support.pictures import encode

LARGE = ALWAYS // BYTES_PER_PIXEL  # pixels: all that is given without asking


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no memory to spare."""
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    monkeypatch.setattr(room, "_ASK_AGAIN_SECONDS", 0.01)


def most_at_once(pixels: int, claims: int = 8) -> int:
    inside, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        claim = Claim()
        claim.take(pixels)
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1
        claim.give_back()

    with ThreadPoolExecutor(claims) as pool:
        list(pool.map(work, range(claims)))
    return most


@pytest.mark.usefixtures("short")
def test_images_larger_than_all_memory_go_one_at_a_time() -> None:
    assert most_at_once(10 * LARGE) == 1
    assert most_at_once(LARGE // 2) <= 2


def test_they_go_together_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 2 * 3 * LARGE * BYTES_PER_PIXEL)
    assert 1 <= most_at_once(LARGE) <= 3


@pytest.mark.usefixtures("short")
def test_a_claim_that_grows_does_not_wait_for_itself() -> None:
    claim = Claim()
    claim.take(LARGE)
    claim.take(2 * LARGE)
    claim.take(5)
    claim.give_back()
    assert most_at_once(2 * LARGE, claims=2) == 1  # and all of it was given back


@pytest.mark.usefixtures("short")
def test_memory_decides_when_an_image_is_decoded_not_whether(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)), "PNG")
    expected = np.asarray(decode_image(data))
    monkeypatch.setattr(room, "ALWAYS", 0)
    monkeypatch.setattr(room, "SMALL", 0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: np.asarray(decode_image(data)), range(12)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("short")
def test_an_image_keeps_its_room_until_it_is_done_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ALWAYS", 0)
    monkeypatch.setattr(room, "SMALL", 0)
    data, entered = encode(Image.new("L", (20, 30)), "PNG"), threading.Event()

    def other() -> None:
        with Decoded(data, Decoding()):
            entered.set()

    with Decoded(data, Decoding()) as image:
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(30)
    thread.join()
    with pytest.raises(ValueError, match="closed"):
        np.asarray(image)
