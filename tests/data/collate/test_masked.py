"""What is masked, how much of it, and that nothing but the seed and the sample's key decides."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data.collate.masked import Masked
from data.loader import IGNORED
from data.packing import Sample
from data.surface import Surface
from data.tokenizer import BPE, END_OF_TEXT, WordPiece, all_special_ids, special_ids

TEXT = " ".join(
    f"the {i * 7919 % 1000} quickest brownish foxes, {i % 7} jumping_over lazy dogs" for i in range(400)
)
T = 64


@cache
def tokenizer(kind: str = "bpe") -> Tokenizer:
    recipe = BPE(420, special=["masking"]) if kind == "bpe" else WordPiece(80, special=["masking"])
    made = recipe.train([TEXT])
    made.encode_special_tokens = True
    return made


@cache
def stream() -> np.ndarray:
    return np.array(tokenizer().encode(TEXT).ids, np.int64)


def sample(index: int, *lengths: int, window: int = T - 2, step: int | None = 0, ends: bool = True) -> Sample:
    """A window of pieces of these lengths, each but the last a document's end; one piece if none is given."""
    lengths = lengths or (window,)
    bounds = np.cumsum([0, *lengths])
    start = index * 37 % (len(stream()) - int(bounds[-1]))
    tokens = stream()[start : start + int(bounds[-1])].copy()
    end = tokenizer().token_to_id(END_OF_TEXT)
    if ends:
        tokens[bounds[1:-1] - 1] = end
    return Sample(tokens, np.full(len(lengths), end), bounds, (0, index), step)


EMPTY = Sample(np.empty(0, np.int64), np.empty(0, np.int64), np.zeros(1, np.int64), (0, 9), None)


def collate(samples: list[Sample], **options: Any) -> dict[str, torch.Tensor]:
    return Masked(tokenizer(), T, **{"seed": 1, **options})(samples)


def restored(batch: dict[str, torch.Tensor]) -> np.ndarray:
    """The tokens before masking, out of what is shown and the labels."""
    return torch.where(batch["labels"] == IGNORED, batch["tokens"], batch["labels"]).numpy()


WAYS: list[dict[str, Any]] = [
    {},
    {"unit": "word"},
    {"unit": "word", "ngram": 3},
    {"isolate": True},
    {"pairs": "sentence_order"},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_masks_depend_on_seed_and_key_only(options: dict[str, Any]) -> None:
    samples = [sample(i, 20, 41) for i in range(6)]
    together = collate(samples, **options)
    alone = [collate([s], **options) for s in reversed(samples)]
    other_step = [
        Sample(s.tokens, s.before, s.bounds, s.key, step)
        for s, step in zip(samples, (7, None) * 3, strict=True)
    ]
    for key in set(together) & set(alone[0]):
        assert torch.equal(together[key], torch.cat([batch[key] for batch in alone[::-1]]))
        assert torch.equal(together[key], collate(other_step, **options)[key])
    assert not torch.equal(together["labels"], collate(samples, seed=2, **options)["labels"])
    same_text = [
        Sample(samples[0].tokens, samples[0].before, samples[0].bounds, key) for key in ((0, 0), (1, 0))
    ]
    first, second = collate(same_text, **options)["labels"]
    assert not torch.equal(first, second)


def test_evaluation_masks_the_same_way_every_time() -> None:
    samples = [sample(i, step=None) for i in range(4)]
    masked = Masked(tokenizer(), T, seed=1)
    first, second = masked(samples), masked(samples)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 1.0])
def test_the_rate_is_exact_in_every_sequence(rate: float) -> None:
    lengths = [62, 40, 7, 1]
    batch = collate([sample(i, length) for i, length in enumerate(lengths)], rate=rate)
    masked = (batch["labels"] != IGNORED).sum(1).tolist()
    assert masked == [max(1, round(rate * length)) for length in lengths]
    assert batch["metric_masked_token"].tolist() == masked


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_special_tokens_are_never_masked_nor_put_in(options: dict[str, Any]) -> None:
    samples = [sample(i, 5, 9, 10, 30) for i in range(50)]
    batch = collate(samples, **{**options, "rate": 0.9})
    labelled = batch["labels"] != IGNORED
    special = torch.tensor(all_special_ids(tokenizer()))
    assert not torch.isin(batch["labels"][labelled], special).any()
    shown = batch["tokens"][labelled]
    assert not torch.isin(shown[shown != tokenizer().token_to_id("[MASK]")], special).any()


def test_of_the_masked_tokens_80_10_and_10_percent_are_hidden_replaced_and_kept() -> None:
    batch = collate([sample(i) for i in range(2000)], rate=0.5)
    labelled = batch["labels"] != IGNORED
    shown, labels = batch["tokens"][labelled], batch["labels"][labelled]
    n = len(labels)
    hidden = (shown == tokenizer().token_to_id("[MASK]")).float().mean().item()
    kept = (shown == labels).float().mean().item()
    assert n > 60_000
    assert hidden == pytest.approx(0.8, abs=0.006) and kept == pytest.approx(0.1, abs=0.006)
    replaced = shown[(shown != labels) & (shown != tokenizer().token_to_id("[MASK]"))]
    texts = tokenizer().get_vocab_size() - len(all_special_ids(tokenizer()))
    assert len(replaced.unique()) == texts  # any of the vocabulary
    assert torch.equal(batch["tokens"][~labelled], torch.from_numpy(restored(batch))[~labelled])


def test_shares_are_as_asked_for() -> None:
    samples = [sample(i) for i in range(10)]
    batch = collate(samples, mask_share=1.0, random_share=0.0)
    assert (batch["tokens"][batch["labels"] != IGNORED] == tokenizer().token_to_id("[MASK]")).all()
    assert torch.equal(
        collate(samples, mask_share=0.0, random_share=0.0)["tokens"], torch.tensor(restored(batch))
    )


def test_a_sequence_is_the_text_between_cls_and_sep() -> None:
    _, cls, sep, _ = special_ids(tokenizer(), "masking")
    samples = [sample(i, 20, 42) for i in range(3)]
    batch = collate(samples)
    assert set(batch) == {"tokens", "labels", "metric_masked_token"}
    for row, one in zip(restored(batch), samples, strict=True):
        assert row.tolist() == [cls, *one.tokens, sep]
        assert tokenizer().decode(row[1:-1].tolist()) == tokenizer().decode(one.tokens.tolist())


def test_what_a_sample_lacks_is_padding() -> None:
    pad = tokenizer().token_to_id("[PAD]")
    batch = collate([sample(0, 10), EMPTY])
    assert (batch["tokens"][0, 12:] == pad).all() and (batch["tokens"][1] == pad).all()
    assert (batch["labels"][1] == IGNORED).all()
    assert batch["documents"].dtype == torch.int32
    assert batch["documents"].tolist() == [[0] * 12 + [-1] * (T - 12), [-1] * T]
    for options in WAYS:
        alone = collate([EMPTY], **options)
        assert (alone["labels"] == IGNORED).all() and (alone["tokens"] == pad).all()
        assert not any(alone[key].any() for key in alone if key.startswith("metric_"))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("ngram", [1, 3])
def test_words_are_masked_whole_and_within_the_rate(kind: str, ngram: int) -> None:
    made = tokenizer(kind)
    tokens = np.array(made.encode(TEXT).ids, np.int64)
    words = Surface(made).words
    masked = Masked(made, T, seed=1, unit="word", ngram=ngram)
    total = several = 0
    for i in range(100):
        text = tokens[i * 11 : i * 11 + 62]
        batch = masked([Sample(text, text[:1], np.array([0, 62]), (0, i))])
        labelled = (batch["labels"][0, 1:-1] != IGNORED).numpy()
        number = words(text)
        assert not set(number[labelled]) & set(number[~labelled])
        assert 7 <= labelled.sum() <= 9 == round(0.15 * 62)
        total += labelled.sum()
        several += labelled.sum() - len(set(number[labelled]))
    assert total >= 0.99 * 900 and several > 100


def test_a_word_longer_than_the_rate_is_masked_alone() -> None:
    text = np.array(tokenizer().encode("zzzzzzzz").ids, np.int64)
    assert len(text) > 5
    batch = collate([Sample(text, text[:1], np.array([0, len(text)]), (0, 0))], unit="word")
    assert (batch["labels"] != IGNORED).sum() == len(text)


def test_spans_are_as_long_as_their_shares_say() -> None:
    """Runs of a low rate, which seldom touch: n tokens with a probability of (1/n) / (1 + 1/2 + 1/3)."""
    masked = Masked(tokenizer(), 1026, seed=1, rate=0.02, ngram=3)
    runs: list[int] = []
    for i in range(300):
        labelled = (masked([sample(i, window=1024)])["labels"][0] != IGNORED).numpy()
        edges = np.flatnonzero(np.diff(labelled.astype(int), prepend=0, append=0))
        runs += (edges[1::2] - edges[::2]).tolist()
    shares = np.bincount(runs, minlength=4)[1:4] / len(runs)
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.04)


def test_spans_do_not_reach_over_special_tokens() -> None:
    masked = Masked(tokenizer(), T, seed=1, unit="word", ngram=3, rate=1.0, mask_share=0.0, random_share=0.0)
    batch = masked([sample(i, 20, 20, 22) for i in range(20)])
    assert ((batch["labels"] == IGNORED).sum(1) == 4).all()  # [CLS], two ends, [SEP]


def test_isolated_documents_are_framed_one_by_one() -> None:
    _, cls, sep, _ = special_ids(tokenizer(), "masking")
    one = sample(3, 10, 20, 32)
    batch = collate([one, sample(4, 5, 6)], isolate=True)
    pieces = [one.tokens[:9], one.tokens[10:29], one.tokens[30:]]
    framed = [np.array([cls, *piece, sep]) for piece in pieces]
    framed[2] = np.array([cls, *pieces[2][:30], sep])  # 64 - 11 - 21, of which two are its frame
    assert restored(batch)[0].tolist() == np.concatenate(framed).tolist()
    assert batch["documents"][0].tolist() == [0] * 11 + [1] * 21 + [2] * 32
    assert batch["documents"][1].tolist() == [0] * 6 + [1] * 8 + [-1] * 50
    assert batch["metric_cut"].tolist() == [2, 0]
    many = sample(5, *[2] * 31)
    assert collate([many], isolate=True)["metric_cut"].item() == 30 + 2 - T // 3  # each takes three places


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^tokenizer.special: .* no \[PAD\].*; add masking to tokenizer.special$"
    ):
        Masked(BPE(300).train([TEXT]), T, seed=1)
    with pytest.raises(
        ValueError, match=r"^packing.isolate: true does not go with objective.pairs=sentence_order"
    ):
        collate([], pairs="sentence_order", isolate=True)
    with pytest.raises(ValueError, match=r"^sequence_length: 2 leaves no room"):
        Masked(tokenizer(), 2, seed=1)
