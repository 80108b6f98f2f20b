"""Listings as earlier releases made them, for caches that were begun then: their rows must stay as they are.

Members of a tar were one sample only while they followed one another, hidden ones between them included; any image was
taken where a plain one was missing, links were passed over, and the label's extension had to be `cls` alone.
"""

from itertools import groupby
from typing import Final

from kpu.errors import SourceError
from kpu.sources.folder import FolderListing
from kpu.sources.formats import extension
from kpu.sources.tars.grouping import Row, Samples, split_name
from kpu.sources.tars.headers import Member, members
from kpu.sources.tars.listing import TarListing

_IMAGES: Final = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif"}
    | {"ppm", "pgm", "pbm", "pnm"}
)


class EarlierFolderListing(FolderListing):
    """A folder whose images are those that these releases read."""

    images = _IMAGES

    def refuse_nameless(self, path: str) -> None:
        """Pass over keys with nothing between two slashes."""


class EarlierTarListing(TarListing):
    """Tars by the rules above."""

    def _take_images(self, tar: str, samples: Samples, beside: dict[str, str], alone: dict[str, str]) -> None:
        pass

    def _scan(self, tar: str) -> Samples:
        samples = Samples(self._files.name(tar), tar, self._choice)
        for key, group in groupby(members(self._files, tar), key=lambda member: split_name(member.name)[0]):
            parts = [(split_name(member.name)[1], member) for member in group]
            if key is None:
                continue
            chosen = self._chosen(parts)
            if len(chosen) > 1:
                raise SourceError(
                    f"{self._files.name(tar)}: expected one image a sample, found {len(chosen)} of {key!r}"
                )
            if chosen:
                label = next((member for ending, member in parts if ending in self._choice.label), None)
                number = None if label is None else samples.number(label)
                samples.rows.append(Row(key, chosen[0].offset, chosen[0].length, number, ""))
        return samples

    def _chosen(self, parts: list[tuple[str, Member]]) -> list[Member]:
        if self._choice.image:
            return [member for ending, member in parts if ending in self._choice.image]
        plain = [member for ending, member in parts if ending in _IMAGES]
        return plain or [member for _, member in parts if extension(member.name) in _IMAGES]
