from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.packing import PADDING, BestFit, Chunks, Joined, Packing, Sample, document_ids
from data.shards import TokenStream
from tests.data.documents import END, numbered, write_documents

STREAMS = {
    "one short document": [3],
    "one long document": [97],
    "one that fills its windows exactly": [23],
    "nothing but empty texts": [0] * 30,
    "many tiny ones": [1, 2, 0, 3, 1, 1, 4, 2] * 25,
    "mixed": [40, 3, 7, 8, 0, 15, 16, 1, 33, 2, 2, 5, 7, 64, 6],
    "all as long as a window": [7] * 9,
}
WINDOWS = (1, 2, 5, 8, 24, 1000)
METHODS = ("chunks", "chunks with the rest", "best fit")


def make(method: str, stream: TokenStream, window: int) -> Packing:
    if method == "best fit":
        return BestFit(stream, window)
    return Chunks(stream, window, rest=method == "chunks with the rest")


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStream:
    return write_documents(tmp_path, numbered(STREAMS[request.param]))


def stretches(packing: Packing) -> np.ndarray:
    """int64 [n, 2]: all pieces of all samples."""
    return np.concatenate([packing.pieces(i) for i in range(packing.samples)] or [np.empty((0, 2), np.int64)])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_in_one_sample(stream: TokenStream, method: str, window: int) -> None:
    packing = make(method, stream, window)
    held = np.zeros(stream.tokens, int)
    for start, stop in stretches(packing):
        held[start:stop] += 1
    kept = stream.tokens // window * window if method == "chunks" else stream.tokens
    assert (held[:kept] == 1).all() and not held[kept:].any()
    tokens = np.concatenate([[], *(packing.sample(i).tokens for i in range(packing.samples))])
    assert Counter(tokens.tolist()) == Counter(stream.read(0, kept).tolist())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", METHODS)
def test_a_piece_lies_within_one_document_and_knows_the_token_before_it(
    stream: TokenStream, method: str, window: int
) -> None:
    packing = make(method, stream, window)
    for i in range(packing.samples):
        sample, pieces = packing.sample(i), packing.pieces(i)
        lengths = pieces[:, 1] - pieces[:, 0]
        assert (lengths > 0).all() and lengths.sum() == len(sample.tokens) <= window
        assert sample.tokens.dtype == sample.before.dtype == sample.bounds.dtype == np.int64
        assert np.array_equal(sample.bounds, np.concatenate([[0], np.cumsum(lengths)]))
        documents = np.searchsorted(stream.offsets, pieces[:, 0], side="right") - 1
        assert (pieces[:, 1] <= stream.offsets[documents + 1]).all()
        for (start, stop), before, low, high in zip(
            pieces, sample.before, sample.bounds, sample.bounds[1:], strict=False
        ):
            assert sample.tokens[low:high].tolist() == stream.read(start, stop).tolist()
            assert before == stream.read(start - 1, start)[0]
            if start in stream.offsets:
                assert before == END
        if method != "best fit":  # neighbours in the stream are neighbours in the sample
            assert np.array_equal(pieces[1:, 0], pieces[:-1, 1])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", METHODS)
def test_usage_says_what_is_seen_by_counting(stream: TokenStream, method: str, window: int) -> None:
    packing = make(method, stream, window)
    if not packing.samples:
        return
    usage, pieces = packing.usage(), stretches(packing)
    tokens = int((pieces[:, 1] - pieces[:, 0]).sum())
    assert usage.dropped_tokens == stream.tokens - tokens
    documents = np.searchsorted(stream.offsets, pieces[:, 0], side="right") - 1
    parts = np.bincount(documents, minlength=stream.documents)
    if usage.dropped_tokens:  # the tail is a part as well
        tail = np.searchsorted(stream.offsets, tokens, side="right") - 1
        parts[tail] += int(parts[tail] > 0)
    assert usage.cut_documents == (parts > 1).sum()


@pytest.mark.parametrize("window", WINDOWS)
def test_best_fit_cuts_only_what_is_too_long_and_fills_windows(stream: TokenStream, window: int) -> None:
    packing = BestFit(stream, window)
    pieces = [packing.pieces(i) for i in range(packing.samples)]
    starts = np.concatenate(pieces)[:, 0]
    for first, end in zip(stream.offsets, stream.offsets[1:], strict=False):
        own = np.sort(starts[(starts >= first) & (starts < end)])
        assert own.tolist() == list(range(first, end, window))
    used = [int((stretch[:, 1] - stretch[:, 0]).sum()) for stretch in pieces]
    assert sum(2 * size <= window for size in used) <= 1  # two half-full windows would have been one


def naive_best_fit(lengths: list[int], window: int) -> list[list[int]]:
    """Windows as lists of the lengths of rests, by the textbook: each into the fullest that has room."""
    bins: list[list[int]] = []
    for size in sorted((length % window for length in lengths if length % window), reverse=True):
        fitting = [bin_ for bin_ in bins if sum(bin_) + size <= window]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_textbooks(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.geometric(0.02, 300).tolist()
    packing = BestFit(write_documents(tmp_path, numbered(lengths), shard_tokens=10_000), 64)
    full = sum((length + 1) // 64 for length in lengths)
    shared = [packing.pieces(i) for i in range(full, packing.samples)]
    own = sorted(int((stretch[:, 1] - stretch[:, 0]).sum()) for stretch in shared)
    assert own == sorted(sum(bin_) for bin_ in naive_best_fit([length + 1 for length in lengths], 64))
    assert packing.stream.tokens > 0.97 * 64 * packing.samples


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_leaves_room_for_what_a_collator_adds_to_each_piece(tmp_path: Path, seed: int) -> None:
    lengths = np.random.default_rng(seed).geometric(0.1, 300).tolist()
    packing = BestFit(write_documents(tmp_path, numbered(lengths), shard_tokens=10_000), 30, overhead=2)
    pieces = [packing.pieces(i) for i in range(packing.samples)]
    assert max(int((p[:, 1] - p[:, 0] + 2).sum()) for p in pieces) == 32
    stretches = np.concatenate(pieces)
    assert (stretches[:, 1] - stretches[:, 0]).sum() == packing.stream.tokens
    assert packing.stream.tokens + 2 * len(stretches) > 0.97 * 32 * packing.samples


@pytest.mark.parametrize("method", METHODS)
def test_past_the_last_sample_there_are_empty_ones(tmp_path: Path, method: str) -> None:
    packing = make(method, write_documents(tmp_path, numbered([20, 3])), 8)
    sample = packing.sample(packing.samples + 2, epoch=1, step=9)
    assert (len(sample.tokens), len(sample.before), sample.bounds.tolist()) == (0, 0, [0])
    assert (sample.key, sample.step) == ((1, packing.samples + 2), 9)
    assert document_ids(sample.bounds, 4).tolist() == [PADDING] * 4


def test_a_stream_shorter_than_a_window_has_a_sample_only_where_rests_count(tmp_path: Path) -> None:
    stream = write_documents(tmp_path, numbered([2]))
    assert [make(method, stream, 8).samples for method in METHODS] == [0, 1, 1]


def test_a_stream_without_documents_has_no_samples(tmp_path: Path) -> None:
    write_documents(tmp_path, numbered([2]))
    stream = TokenStream(tmp_path, "train")
    stream.tokens = stream.documents = 0
    np.save(tmp_path / "train-offsets.npy", np.zeros(1, np.int64))
    assert [make(method, stream, 8).samples for method in METHODS] == [0, 0, 0]


def test_document_ids_count_pieces_up_and_mark_padding() -> None:
    ids = document_ids(np.array([0, 2, 3, 6]), 8)
    assert ids.tolist() == [0, 0, 1, 2, 2, 2, PADDING, PADDING]
    assert ids.dtype == np.int32
    assert document_ids(np.array([0, 3]), 3).tolist() == [0, 0, 0]


def sample(epoch: int, index: int, step: int | None = None) -> Sample:
    return Sample(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64), (epoch, index), step)


def test_chance_depends_on_the_seed_and_the_key_alone() -> None:
    draws = {
        (seed, epoch, index): tuple(sample(epoch, index).random(seed).integers(0, 2**63, 4))
        for seed in (0, 1, 2**63 - 1)
        for epoch in (0, 1, 5)
        for index in (0, 1, 2**40)
    }
    assert len(set(draws.values())) == len(draws)
    for (seed, epoch, index), drawn in draws.items():
        assert tuple(sample(epoch, index, step=epoch + 7).random(seed).integers(0, 2**63, 4)) == drawn


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("method", ["chunks with the rest", "best fit"])
def test_the_rows_of_a_sample_are_those_of_a_packing_of_their_length(
    stream: TokenStream, method: str, length: int
) -> None:
    packing = make(method, stream, 12)
    for index in range(packing.samples):
        whole = packing.sample(index, epoch=3, step=7)
        rows = whole.cut(length, 12 // length)
        assert len(rows) == 12 // length
        assert np.concatenate([row.tokens for row in rows]).tolist() == whole.tokens.tolist()
        assert all(len(row.tokens) == length for row in rows[: len(whole.tokens) // length])
        assert [row.key for row in rows] == (
            [(3, index, row) for row in range(len(rows))] if len(rows) > 1 else [(3, index)]
        )
        for row in rows:
            assert row.step == 7 and row.tokens.dtype == row.before.dtype == row.bounds.dtype == np.int64
            assert row.bounds[0] == 0 and row.bounds[-1] == len(row.tokens)
            assert (np.diff(row.bounds) > 0).all() and len(row.before) == len(row.bounds) - 1
            for piece, before in enumerate(row.before):  # tokens are all different: a value is a place
                place = np.flatnonzero(stream.read(0, stream.tokens) == row.tokens[row.bounds[piece]])
                if row.tokens[row.bounds[piece]] != END:
                    assert before == stream.read(place[0] - 1, place[0])[0]


def test_cutting_keeps_the_pieces_of_documents_apart() -> None:
    whole = Sample(
        np.array([11, 12, 0, 21, 22, 23, 0, 31]), np.array([10, 0, 0]), np.array([0, 3, 7, 8]), (0, 5)
    )
    rows = whole.cut(2, 5)
    assert [row.tokens.tolist() for row in rows] == [[11, 12], [0, 21], [22, 23], [0, 31], []]
    assert [row.before.tolist() for row in rows] == [[10], [12, 0], [21], [23, 0], []]
    assert [row.bounds.tolist() for row in rows] == [[0, 2], [0, 1, 2], [0, 2], [0, 1, 2], [0]]
    draws = {tuple(row.random(1).integers(0, 2**63, 2)) for row in rows}
    assert len(draws) == 5


def test_joined_packings_are_read_as_one(tmp_path: Path) -> None:
    streams = []
    for name, lengths in {"a": [9, 9, 2], "b": [30], "c": [3, 4]}.items():
        (tmp_path / name).mkdir()
        streams.append(write_documents(tmp_path / name, numbered(lengths, first=100 * len(streams) + 1)))
    parts = [make("chunks", streams[0], 5), make("best fit", streams[1], 5), make("chunks", streams[2], 5)]
    joined = Joined(parts)
    assert (joined.samples, joined.window) == (sum(part.samples for part in parts), 5)
    separate = [part.sample(i) for part in parts for i in range(part.samples)]
    for index, alone in enumerate(separate):
        found = joined.sample(index, epoch=2, step=4)
        assert (found.key, found.step) == ((2, index), 4)
        assert (
            found.tokens.tolist() == alone.tokens.tolist() and found.before.tolist() == alone.before.tolist()
        )
        assert found.bounds.tolist() == alone.bounds.tolist()
    past = joined.sample(joined.samples + 1, epoch=1)
    assert (len(past.tokens), past.key) == (0, (1, joined.samples + 1))
    usages = [part.usage() for part in parts]
    assert joined.usage().cut_documents == sum(usage.cut_documents for usage in usages) > 0
    assert joined.usage().dropped_tokens == sum(usage.dropped_tokens for usage in usages) > 0
