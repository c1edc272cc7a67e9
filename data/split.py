"""Which text is held out for validation. A rule yields (split, document) for every document of a source."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from data.cli import standing_at
from data.sources import Document, Parts, Source

Split = Literal["train", "validation"]


class SplitRule(Protocol):
    def split(self, source: Source) -> Iterator[tuple[Split, Document]]: ...

    def inputs(self) -> dict[str, Any]:
        """Inputs besides those of the source."""
        ...


class ByDocument:
    """Hold out whole documents, chosen by a hash of their id: a document stays on its side when others come.

    share: about how much of the documents is held out, in (0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = _checked(share)

    def split(self, source: Source) -> Iterator[tuple[Split, Document]]:
        for document in source.documents():
            digest = hashlib.blake2b(document.id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            held_out = int.from_bytes(digest, "big") < self.share * 2**64
            yield ("validation" if held_out else "train"), document

    def inputs(self) -> dict[str, Any]:
        return {}


class ByPosition:
    """Hold out the end of the text: its first 1 - share of characters train. The one rule for a single file.

    Reads the source once more, to count its characters. share: in (0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = _checked(share)
        self._cut: int | None = None

    def split(self, source: Source) -> Iterator[tuple[Split, Document]]:
        if isinstance(source, Parts):
            raise ValueError(
                "data.validation: ByPosition would hold out the end of the last part; set"
                " data.validation._target_=data.split.ByDocument"
            )
        if self._cut is None:
            self._cut = int(sum(len(document.text) for document in source.documents()) * (1 - self.share))
        left = self._cut
        for document in source.documents():
            before, after = document.text[: max(left, 0)], document.text[max(left, 0) :]
            left -= len(document.text)
            if before:
                yield "train", document._replace(text=before, ends=document.ends or left <= 0)
            if after:
                yield "validation", document._replace(text=after)

    def inputs(self) -> dict[str, Any]:
        return {}


class FromSource:
    """Train on the whole source and validate on another one. documents: its first so many; None: on all."""

    def __init__(self, source: Source, documents: int | None = None) -> None:
        if source is None:
            raise ValueError("data.validation.source: must be set; name a source, as for data.source")
        self.source = source
        self.documents = documents

    def split(self, source: Source) -> Iterator[tuple[Split, Document]]:
        for document in source.documents():
            yield "train", document
        yield from self.held_out()

    def held_out(self) -> Iterator[tuple[Split, Document]]:
        """The validation split alone."""
        left = self.documents
        with standing_at("data.validation.source"):
            for document in self.source.documents():
                yield "validation", document
                if left is not None and document.ends:
                    left -= 1
                    if left == 0:
                        return

    def inputs(self) -> dict[str, Any]:
        with standing_at("data.validation.source"):
            return {"validation": self.source.inputs()}


def _checked(share: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"data.validation.share: {share} is not between 0 and 1")
    return share
