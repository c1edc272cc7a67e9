"""Pairs of texts: where they are cut, their class, and where a text of another document comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.collate.masked import Masked
from data.loader import IGNORED
from data.packing import Sample
from data.shards import MANIFEST, SplitWriter, TokenStream
from data.surface import Surface
from data.tokenizer import special_ids
from tests.data.collate.test_masked import EMPTY, T, collate, restored, sample, stream, tokenizer


def test_sentence_order_swaps_half_of_the_pairs_at_a_word() -> None:
    _, cls, sep, _ = special_ids(tokenizer(), "masking")
    masked = Masked(tokenizer(), T, seed=1, pairs="sentence_order")
    assert masked.window == T - 3
    samples = [sample(i, 15, 46) for i in range(400)]
    batch = masked(samples)
    assert batch["pairs"].float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (batch["metric_cut"] == 14).all()
    words = Surface(tokenizer()).words
    for i, one in enumerate(samples):
        row, segments = restored(batch)[i], batch["segments"][i]
        first_sep, second_sep = np.flatnonzero(row == sep)
        a, b = row[1:first_sep], row[first_sep + 1 : second_sep]
        assert segments.tolist() == [0] * (first_sep + 1) + [1] * (len(b) + 1) + [0] * (T - second_sep - 1)
        text = one.tokens[15:]
        assert np.concatenate([b, a] if batch["pairs"][i] else [a, b]).tolist() == text.tolist()
        at = len(b) if batch["pairs"][i] else len(a)
        assert 46 / 4 <= at <= 46 * 3 / 4 and words(text)[at] != words(text)[at - 1]
        assert row[0] == cls


@pytest.mark.parametrize("pairs", ["sentence_order", "next_sentence"])
def test_a_text_too_short_for_two_has_no_class(pairs: str) -> None:
    batch = collate([sample(0, 1), EMPTY], pairs=pairs)
    assert batch["pairs"].tolist() == [IGNORED] * 2 and not batch["segments"].any()
    assert (batch["labels"][0] != IGNORED).sum() == 1


def stream_of(folder: Path, documents: list[np.ndarray]) -> TokenStream:
    """A stream of these documents, each with END_OF_TEXT (0) after it."""
    folder.mkdir()
    writer = SplitWriter(folder, "train", np.dtype(np.uint16))
    for document in documents:
        writer.append(np.array([*document, 0]))
        writer.end_document(len(document))
    manifest = {"vocabulary_size": 420, "end_of_text": 0, "splits": {"train": writer.close()}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return TokenStream(folder, "train")


def test_next_sentence_takes_half_of_the_second_texts_from_other_documents(tmp_path: Path) -> None:
    documents = [stream()[i * 61 : i * 61 + 61] for i in range(40)]
    made = stream_of(tmp_path / "stream", documents)
    masked = Masked(tokenizer(), T, seed=1, pairs="next_sentence", streams=(made, made))
    samples = [Sample(d, d[:1], np.array([0, 61]), (e, i)) for e in range(5) for i, d in enumerate(documents)]
    batch = masked(samples)
    assert batch["pairs"].float().mean().item() == pytest.approx(0.5, abs=0.1)
    sep = tokenizer().token_to_id("[SEP]")
    whole = Surface(tokenizer()).words
    for row, one, pair in zip(restored(batch), samples, batch["pairs"].tolist(), strict=True):
        first_sep, second_sep = np.flatnonzero(row == sep)
        a, b = row[1:first_sep], row[first_sep + 1 : second_sep]
        assert a.tolist() == one.tokens[: len(a)].tolist()
        if not pair:
            assert b.tolist() == one.tokens[len(a) :].tolist()
            continue
        homes = [d for d in documents if b.tobytes() in d.tobytes()]
        assert homes and 61 - len(a) - 8 <= len(b) <= 61 - len(a)
        home, *_ = (d for d in homes if d is not one.tokens)
        at = home.tobytes().index(b.tobytes()) // 8
        assert at == 0 or whole(home)[at] != whole(home)[at - 1]


def test_next_sentence_in_evaluation_takes_held_out_text(tmp_path: Path) -> None:
    training = stream_of(tmp_path / "training", [np.full(99, 401)] * 2)
    held_out = stream_of(tmp_path / "held_out", [np.full(99, 402)] * 2)
    masked = Masked(tokenizer(), T, seed=1, pairs="next_sentence", streams=(training, held_out))
    for step, only in ((0, 401), (None, 402)):
        batch = masked([sample(i, 60, step=step) for i in range(20)])
        rows = restored(batch)[batch["pairs"].numpy() == 1]
        assert len(rows) and (rows == only).any(1).all() and not (rows == 803 - only).any()


def test_next_sentence_is_never_the_text_itself(tmp_path: Path) -> None:
    copies = stream_of(tmp_path / "copies", [stream()[:200]] * 3)
    masked = Masked(tokenizer(), T, seed=1, pairs="next_sentence", streams=(copies, copies))
    text = stream()[50:111]
    batch = masked([Sample(text, text[:1], np.array([0, 61]), (0, i)) for i in range(20)])
    assert (batch["pairs"] == 0).all()


def test_a_stream_of_one_document_is_refused(tmp_path: Path) -> None:
    one = stream_of(tmp_path / "one", [stream()[:9]])
    with pytest.raises(
        ValueError, match=r"^objective.pairs: next_sentence .* has one; choose objective=masked-s"
    ):
        Masked(tokenizer(), T, seed=1, pairs="next_sentence", streams=(one, one))
