"""Why an image has no pixels, thrown from wherever that is seen."""

from kpu.format.commits import ImageStatus


class Refused(Exception):
    """There are no pixels that could be shown to be right; `status` says why."""

    def __init__(self, status: ImageStatus) -> None:
        super().__init__(status.name)
        self.status = status


class NoBytes(bytes):
    """Zero bytes in place of an encoded image, with the reason why there are none."""

    status: ImageStatus

    def __new__(cls, status: ImageStatus) -> "NoBytes":
        empty = super().__new__(cls)
        empty.status = status
        return empty
