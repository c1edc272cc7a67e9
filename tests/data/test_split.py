from collections.abc import Iterator
from typing import Any

import pytest

from data.sources import Document
from data.split import ByDocument, ByPosition, FromSource, SplitRule


class Given:
    """A source of the documents it is given."""

    def __init__(self, *documents: Document) -> None:
        self.given = documents

    def documents(self) -> Iterator[Document]:
        return iter(self.given)

    def inputs(self) -> dict[str, Any]:
        return {"given": len(self.given)}

    def size(self) -> None:
        return None


def halves(rule: SplitRule, source: Given) -> tuple[list[Document], list[Document]]:
    pairs = list(rule.split(source))
    return [d for split, d in pairs if split == "train"], [d for split, d in pairs if split == "validation"]


def test_documents_are_held_out_whole_at_the_share() -> None:
    source = Given(*(Document(f"{i // 2}", "text", ends=bool(i % 2)) for i in range(20_000)))
    train, held_out = halves(ByDocument(0.1), source)
    assert len(train) + len(held_out) == 20_000
    assert 900 < len(held_out) / 2 < 1100
    assert not {document.id for document in train} & {document.id for document in held_out}


def test_a_document_stays_on_its_side_when_others_come() -> None:
    few = Given(*(Document(f"{i}", "text") for i in range(100)))
    many = Given(*(Document(f"{i}", "text") for i in range(1000)))
    small = {document.id for document in halves(ByDocument(0.2), few)[1]}
    large = {document.id for document in halves(ByDocument(0.2), many)[1]}
    assert small == {id for id in large if int(id) < 100}


@pytest.mark.parametrize("sizes", [[1000], [500, 500], [900, 100], [1] * 1000, [899, 2, 99]])
def test_the_end_of_the_text_is_held_out_to_the_character(sizes: list[int]) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [text[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    documents = [Document("a", piece, ends=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    train, held_out = halves(ByPosition(0.1), Given(*documents))
    assert "".join(document.text for document in train) == text[:900]
    assert "".join(document.text for document in held_out) == text[900:]
    assert [d.ends for d in train] == [False] * (len(train) - 1) + [True]
    assert [d.ends for d in held_out] == [False] * (len(held_out) - 1) + [True]


def test_another_source_can_be_the_held_out_one() -> None:
    rule = FromSource(Given(Document("v", "held out")))
    assert halves(rule, Given(Document("t", "train"))) == (
        [Document("t", "train")],
        [Document("v", "held out")],
    )
    assert rule.inputs() == {"validation": {"given": 1}}


@pytest.mark.parametrize("rule", [ByDocument, ByPosition])
@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_a_share_is_between_0_and_1(rule: type[ByDocument], share: float) -> None:
    with pytest.raises(ValueError, match=r"^data\.validation\.share: "):
        rule(share)


def test_a_validation_source_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="^data.validation.source: must be set"):
        FromSource(None)  # type: ignore[arg-type]
