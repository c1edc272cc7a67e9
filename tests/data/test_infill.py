import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.collate.infill import InfillPieces
from data.infill import MARKS, SHORTEST, Infill, InfilledStream
from data.packing import BestFit, Chunks, Sample
from data.shards import TokenStream
from data.tokenizer import Bytes
from tests.data.documents import END, numbered, write_documents

TOKENIZER = Bytes(special=["infilling"]).train([])
MARK_IDS = [TOKENIZER.token_to_id(f"<|fim_{name}|>") for name in ("prefix", "middle", "suffix")]
PREFIX, MIDDLE, SUFFIX = MARK_IDS
FIRST = 1000  # of the tokens of the texts below
LENGTHS = [40, 3, 0, 1, 2, 8, 120, 3, 4, 15, 16, 64, 5] * 12


def plain(folder: Path, lengths: list[int] = LENGTHS) -> TokenStream:
    return write_documents(folder, numbered(lengths, FIRST))


def infilled(stream: TokenStream, rate: float = 0.5, spm_share: float = 0.5, seed: int = 3) -> InfilledStream:
    return InfilledStream(stream, TOKENIZER, rate, spm_share, seed)


def documents(stream: TokenStream) -> list[list[int]]:
    return [
        stream.read(start, stop).tolist()
        for start, stop in zip(stream.offsets, stream.offsets[1:], strict=False)
    ]


def original(document: list[int]) -> tuple[str, list[int]]:
    """The order of a document and the text it was made of, by the layouts of the paper."""
    *text, end = document
    assert end == END
    if text[:1] != [PREFIX]:
        assert not set(text) & set(MARK_IDS)
        return "plain", text
    suffix, middle = text.index(SUFFIX), text.index(MIDDLE)
    assert suffix < middle and Counter(text)[PREFIX] == Counter(text)[SUFFIX] == Counter(text)[MIDDLE] == 1
    before, between, after = text[1:suffix], text[suffix + 1 : middle], text[middle + 1 :]
    if before:
        return "PSM", before + after + between
    return "SPM", after + between  # or PSM without a prefix, which looks the same


def test_every_document_is_its_text_rearranged(tmp_path: Path) -> None:
    stream = plain(tmp_path)
    changed = infilled(stream)
    assert changed.tokens == changed.offsets[-1] == sum(map(len, documents(changed)))
    orders = Counter()
    for was, now in zip(documents(stream), documents(changed), strict=True):
        order, text = original(now)
        orders[order] += 1
        assert text == was[:-1]
        assert len(now) == len(was) + (0 if order == "plain" else MARKS)
        if len(text) < SHORTEST:
            assert order == "plain"
    assert min(orders["PSM"], orders["SPM"], orders["plain"]) > 20


@pytest.mark.parametrize("spm_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_shares_are_as_asked_for(tmp_path: Path, rate: float, spm_share: float) -> None:
    count = 3000
    changed = infilled(plain(tmp_path, [12] * count), rate, spm_share)
    orders = Counter(original(document)[0] for document in documents(changed))
    rearranged = count - orders["plain"]
    assert abs(rearranged - count * rate) <= 4 * (count * rate * (1 - rate)) ** 0.5
    # Of cuts at 13 places each, 25 in 169 pairs leave PSM without a prefix.
    spm = spm_share + (1 - spm_share) * 25 / 169
    assert abs(orders["SPM"] - rearranged * spm) <= 4 * (rearranged * spm * (1 - spm)) ** 0.5


def test_parts_meet_at_uniform_positions(tmp_path: Path) -> None:
    infill = Infill(1.0, 0.0, *MARK_IDS)
    found = Counter()
    for seed in range(9000):
        _, prefix, _, suffix, _, middle = infill.layout(2, np.random.default_rng(seed))
        assert isinstance(prefix, slice) and isinstance(middle, slice) and isinstance(suffix, slice)
        assert (prefix.start, prefix.stop, middle.stop, suffix.stop) == (0, middle.start, suffix.start, 2)
        found[middle.start, middle.stop] += 1
    for (first, second), seen in found.items():
        assert abs(seen - (1000 if first == second else 2000)) < 160
    assert len(found) == 6


def test_any_stretch_reads_as_it_does_in_sequence(tmp_path: Path) -> None:
    changed = infilled(plain(tmp_path, [9, 0, 3, 30, 2, 7, 1, 5, 5, 5]), rate=0.8)
    whole = [END, *np.concatenate(documents(changed)).tolist()]
    again = infilled(TokenStream(tmp_path, "train"), rate=0.8)
    for start in range(-1, changed.tokens + 1):
        for stop in range(start, changed.tokens + 1):
            assert again.read(start, stop).tolist() == whole[start + 1 : stop + 1]
    assert changed.read(0, changed.tokens).dtype == np.uint16
    for start, stop in ((-2, 1), (0, changed.tokens + 1), (3, 2)):
        with pytest.raises(IndexError):
            changed.read(start, stop)


def test_it_knows_the_shards_that_it_reads(tmp_path: Path) -> None:
    stream = infilled(plain(tmp_path))
    random = np.random.default_rng(0)
    for start, stop in np.sort(random.integers(0, stream.tokens, (60, 2), endpoint=True)).tolist():
        if start == stop:
            continue
        known = stream.shards_of(np.array([[start - 1, stop]]))
        stream.shards._maps.clear()
        stream.read(start - 1, stop)
        assert set(stream.shards._maps) <= set(known)
        assert max(known) < len(stream.shards.entries)


def test_it_says_of_itself_what_the_plain_stream_does(tmp_path: Path) -> None:
    stream = plain(tmp_path)
    changed = infilled(stream)
    for name in ("documents", "bytes", "vocabulary_size", "end_of_text", "folder", "split"):
        assert getattr(changed, name) == getattr(stream, name)
    assert changed.offsets.dtype == np.int64 and len(changed.offsets) == stream.documents + 1


def test_a_document_depends_on_the_seed_and_its_index_alone(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    few, more = infilled(plain(tmp_path, LENGTHS)), infilled(plain(tmp_path / "more", LENGTHS * 2))
    assert documents(few) == documents(more)[: len(LENGTHS)]
    backwards = infilled(TokenStream(tmp_path, "train"))
    read = [
        backwards.read(*backwards.offsets[i : i + 2].tolist()).tolist() for i in reversed(range(len(LENGTHS)))
    ]
    assert read[::-1] == documents(few)
    assert documents(infilled(TokenStream(tmp_path, "train"), seed=4)) != documents(few)


@pytest.mark.parametrize("window", [1, 7, 50, 300])
def test_it_packs_as_any_stream(tmp_path: Path, window: int) -> None:
    changed = infilled(plain(tmp_path))
    for packing in (Chunks(changed, window, rest=True), BestFit(changed, window)):
        tokens = np.concatenate([packing.sample(i).tokens for i in range(packing.samples)])
        assert Counter(tokens.tolist()) == Counter(changed.read(0, changed.tokens).tolist())


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer\.special: .*<\|fim_prefix\|>.* add infilling"):
        InfilledStream(plain(tmp_path), Bytes().train([]), 0.5, 0.5, 0)


def test_a_window_of_a_huge_document_is_read_alone(tmp_path: Path) -> None:
    stream = write_documents(tmp_path, [np.full(3_000_000, 7), np.full(50, 8)], shard_tokens=2**22)
    changed = infilled(stream, rate=1.0)
    seconds = []
    for start in range(10_000, 3_000_000, 150_000):
        started = time.perf_counter()
        assert len(changed.read(start, start + 512)) == 512
        seconds.append(time.perf_counter() - started)
    assert np.median(seconds) < 1e-3


def pieces_of(documents: list[list[int]], *, step: int | None, index: int = 0) -> Sample:
    tokens = np.concatenate([*documents, []]).astype(np.int64)
    bounds = np.cumsum([0, *map(len, documents)])
    return Sample(tokens, np.arange(500, 500 + len(documents)), bounds, (0, index), step)


def collator(isolate: bool = False, rate: float = 0.5, window: int = 64) -> InfillPieces:
    infill = Infill(rate, 0.5, *MARK_IDS)
    return InfillPieces(window, END, isolate, infill=infill, seed=1)


def test_pieces_are_rearranged_within_their_place() -> None:
    orders = Counter()
    for index in range(200):
        ended, tiny = [*range(FIRST, FIRST + 30), END], [FIRST + 50, FIRST + 51, END]
        cut = list(range(FIRST + 100, FIRST + 130))  # the window ends before the document
        sample = pieces_of([ended, tiny, cut], step=4, index=index)
        batch = collator(isolate=True)([sample])
        labels, tokens = batch["labels"][0].tolist(), batch["tokens"][0].tolist()
        assert batch["documents"][0].tolist() == [0] * 31 + [1] * 3 + [2] * 30
        lost = 0
        for (start, stop), was in zip([(0, 31), (31, 34), (34, 64)], [ended, tiny, cut], strict=True):
            now = labels[start:stop]
            assert tokens[start + 1 : stop] == now[:-1]
            if now == was:
                orders["plain"] += 1
                assert tokens[start] == sample.before[[0, 31, 34].index(start)]
                continue
            order, text = original(now)
            orders[order] += 1
            assert text == was[: len(text)] and len(now) == len(was)
            assert tokens[start] == END
            lost += sum(token != END for token in was) - len(text)
        assert batch["metric_cut_tokens"].tolist() == [lost] and labels[31:34] == tiny
    chosen = orders["PSM"] + orders["SPM"]
    assert abs(chosen - 200) < 4 * (400 / 4) ** 0.5 and min(orders["PSM"], orders["SPM"]) > 50


def test_evaluation_takes_the_text_as_it_is() -> None:
    sample = pieces_of([list(range(FIRST, FIRST + 64))], step=None)
    batch = collator(rate=1.0)([sample, pieces_of([], step=None)])
    assert batch["labels"][0].tolist() == sample.tokens.tolist()
    assert batch["metric_cut_tokens"].tolist() == [0, 0]
    assert set(batch) == {"tokens", "labels", "metric_cut_tokens"}


def test_a_rearranged_piece_depends_on_the_seed_and_the_key_alone() -> None:
    def labels(index: int, step: int, at: int, size: int) -> list[int]:
        samples = [pieces_of([list(range(FIRST, FIRST + 64))], step=step, index=900 + i) for i in range(size)]
        samples[at] = pieces_of([list(range(FIRST, FIRST + 64))], step=step, index=index)
        return collator(rate=1.0)(samples)["labels"][at].tolist()

    drawn = [labels(index, 0, 0, 1) for index in range(6)]
    assert [labels(index, 5, 1, 3) for index in range(6)] == drawn
    assert len(set(map(tuple, drawn))) == 6


def test_the_sample_itself_is_left_alone() -> None:
    sample = pieces_of([list(range(FIRST, FIRST + 64))], step=0)
    collator(rate=1.0)([sample])
    assert sample.tokens.tolist() == list(range(FIRST, FIRST + 64)) and sample.before.tolist() == [500]


@pytest.mark.parametrize("level", ["document", "context"])
def test_a_sample_takes_less_than_a_millisecond(tmp_path: Path, level: str) -> None:
    stream = write_documents(tmp_path, numbered([100] * 500, FIRST), shard_tokens=2**20)
    packing = Chunks(infilled(stream) if level == "document" else stream, 512, rest=False)
    collate = collator(window=512)
    seconds = []
    for _ in range(5):  # the best of some: other processes may hold the machine
        started = time.perf_counter()
        samples = [packing.sample(i, step=0) for i in range(64)]
        if level == "context":
            started = time.perf_counter()
            collate(samples)
        seconds.append((time.perf_counter() - started) / 64)
    assert min(seconds) < 1e-3
