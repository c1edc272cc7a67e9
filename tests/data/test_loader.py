import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.collate.causal import Causal
from data.curriculum import Curriculum
from data.loader import IGNORED, Batch, Loader, evaluation_batches, pack
from data.mix import Mixture
from data.order import Order, Ordered
from data.packing import Draw, Joined, Packing, Readable, Sample
from data.shards import TokenStream
from tests.data.conftest import StreamOf
from tests.data.documents import numbered, write_documents

LENGTH = 4


def loader(
    stream: TokenStream, *, global_batch: int = 12, micro: int = 12, rank: int = 0, ranks: int = 1
) -> Loader:
    packing = chunks(stream)
    order = Order(packing.samples, global_batch, seed=9)
    return Loader(packing, order, Causal(LENGTH, 0), micro_batch=micro, rank=rank, world_size=ranks)


def chunks(stream: TokenStream, training: bool = True) -> Packing:
    return pack(stream, "chunk", Causal(LENGTH, 0), training)


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch["labels"].tolist()]


def test_a_sample_predicts_each_token_from_the_one_before(stream_of: StreamOf) -> None:
    stream = stream_of(range(1, 50))
    batch = loader(stream).step(0)[0]
    ids = Order(12, 12, seed=9).step(0)
    for row, i in enumerate(ids):
        labels = list(range(1 + i * LENGTH, 1 + i * LENGTH + LENGTH))
        assert batch["labels"][row].tolist() == labels
        assert batch["tokens"][row].tolist() == [label - 1 for label in labels]  # END_OF_TEXT (0) before 1


def test_an_epoch_predicts_every_token_once(stream_of: StreamOf) -> None:
    stream = stream_of(range(1, 49))  # 48 tokens are 12 samples are one step
    labels = torch.cat([batch["labels"] for batch in loader(stream).step(0)])
    assert sorted(labels.flatten().tolist()) == list(range(1, 49))


@pytest.mark.parametrize(
    ("ranks", "micro"), [(1, 2), (1, 6), (2, 1), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)]
)
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(
    stream_of: StreamOf, ranks: int, micro: int
) -> None:
    stream = stream_of(range(1, 90))
    for step in (0, 1, 7):
        whole = rows(loader(stream).step(step))
        shares = [loader(stream, micro=micro, rank=rank, ranks=ranks).step(step) for rank in range(ranks)]
        assert {len(share) for share in shares} == {12 // (micro * ranks)}
        assert all(batch["tokens"].shape == (micro, LENGTH) for share in shares for batch in share)
        assert Counter(row for share in shares for row in rows(share)) == Counter(whole)
        in_order = [row for micros in zip(*shares, strict=True) for row in rows(list(micros))]
        assert in_order == whole


WORLDS = [(1, 1), (1, 2), (2, 1), (1, 6), (2, 3), (3, 2), (6, 1)]


def union(packing: Readable, order: Ordered, step: int, micro: int, ranks: int, **more: Any) -> list[Any]:
    """The rows of a step on all ranks, sorted."""
    found = []
    for rank in range(ranks):
        rank_loader = Loader(
            packing, order, Causal(LENGTH, 0), micro_batch=micro, rank=rank, world_size=ranks, ahead=0, **more
        )
        found += rows(rank_loader.step(step))
        rank_loader.close()
    return sorted(found)


@pytest.mark.parametrize(("ranks", "micro"), WORLDS)
def test_a_mixture_gives_the_same_union_in_any_world(tmp_path: Path, ranks: int, micro: int) -> None:
    texts = {"a": [50, 39], "b": [49]}
    for name in texts:
        (tmp_path / name).mkdir()
    streams = [write_documents(tmp_path / name, numbered(lengths)) for name, lengths in texts.items()]
    packing = Joined([chunks(stream) for stream in streams])
    sizes = {"a": packing.parts[0].samples, "b": packing.parts[1].samples}
    order = Mixture(sizes, 6, seed=1, weights={"a": 1, "b": 2})
    for step in (0, 1, 9):
        whole = sorted(tuple(packing.sample(int(i)).tokens.tolist()) for i in order.step(step))
        assert union(packing, order, step, micro, ranks) == whole


@pytest.mark.parametrize(("ranks", "micro"), WORLDS)
def test_shorter_rows_give_the_same_union_in_any_world(stream_of: StreamOf, ranks: int, micro: int) -> None:
    packing = chunks(stream_of(range(1, 90)))
    curriculum = Curriculum(
        LENGTH,
        12,
        {0: {"sequence_length": 1, "global_batch": 24}, 2: {"sequence_length": 2}, 4: {"sequence_length": 4}},
    )
    order = Order(packing.samples, curriculum, seed=1)
    shorter = {length: Causal(length, 0) for length in (1, 2)}
    for step in (0, 1, 2, 3, 4, 11):
        length = curriculum.stage(step).sequence_length
        whole = [packing.sample(int(i)).tokens.reshape(-1, length) for i in order.step(step)]
        expected = sorted(tuple(row) for row in np.concatenate(whole).tolist())
        assert len(expected) == curriculum.stage(step).global_batch
        assert union(packing, order, step, micro, ranks, collates=shorter) == expected
    rank = Loader(
        packing, order, Causal(LENGTH, 0), micro_batch=micro, rank=0, world_size=ranks, collates=shorter
    )
    for step in range(6):  # as many tokens in each forward pass
        assert {batch["labels"].numel() for batch in rank.step(step)} == {micro * LENGTH}
    rank.close()


@pytest.mark.parametrize("part", [0, 1, None])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_batches_of_stretches_are_those_of_the_samples(tmp_path: Path, part: int | None, length: int) -> None:
    streams = []
    for name, sizes in {"a": [1, 7, 20, 3], "b": [9, 9, 2]}.items():
        (tmp_path / name).mkdir()
        streams.append(write_documents(tmp_path / name, numbered(sizes)))
    parts = [chunks(stream) for stream in streams]
    packing = Joined(parts) if part is None else parts[part]
    collate = Causal(length, 0)
    samples = [packing.sample(i) for i in range(packing.samples)]
    cuts = [row for sample in samples for row in sample.cut(length, LENGTH // length)]
    expected = collate(cuts)
    every = range(packing.samples)
    draw = Draw(packing, every, [0] * packing.samples, 3, LENGTH // length)
    assert draw.text() is not None
    found = collate(draw)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
    assert [(row.key, row.tokens.tolist()) for row in draw] == [(c.key, c.tokens.tolist()) for c in cuts]
    assert len(draw) == len(cuts) and draw[-1].step == 3
    assert Draw(packing, [0, packing.samples], [0, 0], 3, 1).text() is None


def test_samples_are_made_one_by_one_only_where_batches_need_it(stream_of: StreamOf) -> None:
    packing = chunks(stream_of(range(1, 49)))
    made = []
    sample = packing.sample

    def noted(index: int, *others: Any) -> Sample:
        made.append(index)
        return sample(index, *others)

    packing.sample = noted  # type: ignore[method-assign]
    for isolate, count in ((False, 0), (True, 12)):
        order, collate = Order(packing.samples, 12, seed=9), Causal(LENGTH, 0, isolate)
        batches = Loader(packing, order, collate, micro_batch=12, rank=0, world_size=1, ahead=0).step(0)
        assert len(made) == count
        assert ("documents" in batches[0]) == isolate
        assert sorted(label for row in rows(batches) for label in row) == list(range(1, 49))


def test_a_world_that_a_stage_cannot_be_dealt_out_to_is_refused(stream_of: StreamOf) -> None:
    packing = chunks(stream_of(range(1, 90)))
    curriculum = Curriculum(LENGTH, 12, {0: {"sequence_length": 2}, 5: {"sequence_length": 4}})
    order = Order(packing.samples, curriculum, seed=1)
    with pytest.raises(ValueError, match=r"^curriculum.0: 12 sequences of 2 are 6 of 4, not divisible"):
        Loader(packing, order, Causal(LENGTH, 0), micro_batch=4, rank=0, world_size=1)


def test_a_jump_gives_what_a_fresh_loader_gives(stream_of: StreamOf) -> None:
    stream = stream_of(range(1, 90))
    jumping = loader(stream)
    for step in (0, 1, 1, 10**9, 3, 4, 2):
        assert rows(jumping.step(step)) == rows(loader(stream).step(step))
    jumping.close()


def test_the_next_step_is_made_while_this_one_trains(stream_of: StreamOf) -> None:
    made = threading.Semaphore(0)

    class Watched(Causal):
        def __call__(self, samples: Sequence[Sample]) -> Batch:
            made.release()
            return super().__call__(samples)

    packing = chunks(stream_of(range(1, 90)))
    ahead = Loader(packing, Order(22, 12, 0), Watched(LENGTH, 0), micro_batch=12, rank=0, world_size=1)
    ahead.step(0)
    assert made.acquire(timeout=5) and made.acquire(timeout=5)  # step 0 and, unasked, step 1
    assert ahead.waited_s > 0
    ahead.close()


def test_an_error_in_the_thread_is_raised_in_step(stream_of: StreamOf) -> None:
    class Broken(Causal):
        def __call__(self, samples: Sequence[Sample]) -> Batch:
            raise RuntimeError("broken collator")

    packing = chunks(stream_of(range(1, 90)))
    broken = Loader(packing, Order(22, 2, 0), Broken(LENGTH, 0), micro_batch=2, rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="broken collator"):
        broken.step(0)
    broken.close()


def test_sizes_that_do_not_fit_are_refused(stream_of: StreamOf) -> None:
    stream = stream_of(range(1, 90))
    with pytest.raises(ValueError, match="^global_batch: 12 is not divisible by micro_batch 5 x 1 ranks"):
        loader(stream, micro=5)
    with pytest.raises(ValueError, match="^sequence_length: a sample takes 90 tokens, more than the 89"):
        pack(stream, "chunk", Causal(90, 0), training=True)
    assert pack(stream, "chunk", Causal(89, 0), training=True).samples == 1
    assert pack(stream, "chunk", Causal(90, 0), training=False).samples == 1


def test_a_sample_is_of_its_epoch_and_step(stream_of: StreamOf) -> None:
    seen: list[tuple[int, tuple[int, int], int | None]] = []

    class Watched(Causal):
        def __call__(self, samples: Sequence[Sample]) -> Batch:
            seen.extend((int(sample.tokens[0]), sample.key, sample.step) for sample in samples)
            return super().__call__(samples)

    packing = chunks(stream_of(range(1, 41)))  # 10 samples
    watched = Loader(
        packing, Order(10, 4, 0), Watched(LENGTH, 0), micro_batch=4, rank=0, world_size=1, ahead=0
    )
    for step in range(5):
        watched.step(step)
    watched.close()
    assert [step for _, _, step in seen] == [step for step in range(5) for _ in range(4)]
    assert [epoch for _, (epoch, _), _ in seen] == [0] * 10 + [1] * 10
    assert all(token == 1 + LENGTH * index for token, (_, index), _ in seen)
    assert sorted(index for _, (_, index), _ in seen[:10]) == list(range(10))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 3, 4, 41, 48])
def test_evaluation_predicts_every_token_once_in_as_many_batches_on_each_rank(
    stream_of: StreamOf, ranks: int, tokens: int
) -> None:
    stream = stream_of(range(1, tokens + 1))
    per_rank = [
        list(
            evaluation_batches(
                chunks(stream, training=False), Causal(LENGTH, 0), micro_batch=2, rank=rank, world_size=ranks
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    batches = [batch for batches in per_rank for batch in batches]
    assert all(batch["tokens"].shape == batch["labels"].shape == (2, LENGTH) for batch in batches)
    labels = np.concatenate([batch["labels"].numpy().ravel() for batch in batches])
    inputs = np.concatenate([batch["tokens"].numpy().ravel() for batch in batches])
    predicted = labels != IGNORED
    assert sorted(labels[predicted].tolist()) == list(range(1, tokens + 1))
    assert np.array_equal(inputs[predicted], labels[predicted] - 1)
    assert not inputs[~predicted].any()  # padding is END_OF_TEXT
