import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.collate.causal import Causal
from data.documents import Documents, State, Text, open_documents
from data.loader import Loader
from data.order import Sequential
from data.sources import PIECE, HuggingFace, Rows, Source, TextFiles
from data.stream import StreamPacking, merge
from data.tokenizer import END_OF_TEXT, Bytes

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 8
TEXTS = [f"{i}: " + "é" * (i * 7 % 23) for i in range(20)] + ["", "short", "", "one that is longer " * 5]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Bytes().train([])


def write_jsonl(path: Path, texts: list[str | None]) -> str:
    path.write_text("".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def write_parquet(path: Path, texts: list[str]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=3)
    return str(path)


Corpus = tuple[Source, Callable[[int], list[list[str]]]]  # and the texts of each of so many shards


@pytest.fixture(params=["one jsonl", "parquets", "folder", "text files"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    def strided(texts: list[str]) -> Callable[[int], list[list[str]]]:
        return lambda shards: [texts[shard::shards] for shard in range(shards)]

    if request.param == "one jsonl":
        return Rows("json", write_jsonl(tmp_path / "a.jsonl", list(TEXTS))), strided(TEXTS)
    if request.param == "text files":
        texts = [text for text in TEXTS if text]
        for number, text in enumerate(texts):
            (tmp_path / f"{number:03d}.txt").write_text(text)
        return TextFiles(f"{tmp_path}/*.txt"), strided(texts)
    files = [TEXTS[i : i + 4] for i in range(0, len(TEXTS), 4)]
    for number, texts in enumerate(files):
        write_parquet(tmp_path / f"train-{number}.parquet", texts)

    def by_file(shards: int) -> list[list[str]]:
        return [list(chain(*files[shard::shards])) for shard in range(shards)]

    source = (
        HuggingFace(str(tmp_path)) if request.param == "folder" else Rows("parquet", f"{tmp_path}/*.parquet")
    )
    return source, by_file


def endless(texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[int, int, int | None]]:
    """(token, epoch, token before it where it begins a document) of a shard, for ever."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    for epoch, text in enumerate(cycle([texts])):
        for one in filter(None, text):
            for place, token in enumerate([*tokenizer.encode(one).ids, end]):
                yield token, epoch, None if place else end


def expected(texts: list[list[str]], tokenizer: Tokenizer, windows: int) -> dict[int, tuple]:
    """Of each sample its tokens, before, bounds and epoch, by reading every shard from its beginning."""
    samples = {}
    for shard, own in enumerate(texts):
        found = list(islice(endless(own, tokenizer), windows * WINDOW))
        for window in range(windows):
            part = found[window * WINDOW : (window + 1) * WINDOW]
            starts = [0, *(i for i, (_, _, before) in enumerate(part) if i and before is not None)]
            first = found[window * WINDOW - 1][0] if window else tokenizer.token_to_id(END_OF_TEXT)
            samples[window * len(texts) + shard] = (
                [token for token, _, _ in part],
                [first, *(part[i][2] for i in starts[1:])],
                [*starts, WINDOW],
                part[0][1],
            )
    return samples


def content(packing: StreamPacking, index: int) -> tuple:
    sample = packing.sample(index, step=3)
    assert sample.key[1] == index and sample.step == 3
    assert sample.tokens.dtype == sample.before.dtype == sample.bounds.dtype == np.int64
    return sample.tokens.tolist(), sample.before.tolist(), sample.bounds.tolist(), sample.key[0]


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_samples_are_windows_of_the_shards_which_begin_again(
    corpus: Corpus, tokenizer: Tokenizer, shards: int
) -> None:
    source, texts = corpus
    samples = expected(texts(shards), tokenizer, windows=200 // shards)
    packing = StreamPacking(open_documents(source, shards), tokenizer, WINDOW)
    assert {index: content(packing, index) for index in sorted(samples)} == samples
    assert max(epoch for *_, epoch in samples.values()) >= 1
    packing.close()


def places(state: State) -> dict[str, dict[str, Any]]:
    """A state without what is the data set's own, which may say the same in two ways."""
    return {number: {key: of[key] for key in of if key != "reading"} for number, of in state["of"].items()}


@pytest.mark.parametrize("stop", [1, 2, 7, 30, 61, 110])
def test_a_state_goes_on_where_it_was(corpus: Corpus, tokenizer: Tokenizer, stop: int) -> None:
    source, texts = corpus
    samples = expected(texts(3), tokenizer, windows=60)
    documents = open_documents(source, 3)
    before = StreamPacking(documents, tokenizer, WINDOW)
    for index in range(stop):
        before.sample(index)
    after = StreamPacking(documents, tokenizer, WINDOW)
    after.load_state(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    for index in range(stop, stop + 60):
        assert content(after, index) == samples[index]
        assert content(before, index) == samples[index]  # a state is not read ahead of, nor shared
    assert places(after.state()) == places(before.state())
    after.load_state(after.state())
    assert content(after, stop + 65) == samples[stop + 65]  # some passed over
    after.close()
    before.close()


class Watched:
    """Documents that note which shards are read, and how many texts since."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.shards = documents.shards
        self.read_from: list[tuple[int, State | None]] = []
        self.texts = 0

    def read(self, shard: int, state: State | None) -> Iterator[Text]:
        self.read_from.append((shard, state))
        for text in self.documents.read(shard, state):
            self.texts += 1
            yield text


def test_only_the_shards_asked_for_are_read_and_none_again_from_its_beginning(
    corpus: Corpus, tokenizer: Tokenizer
) -> None:
    watched = Watched(open_documents(corpus[0], 4))
    packing = StreamPacking(watched, tokenizer, WINDOW)
    for index in (1, 3, 5, 7, 9, 11):
        packing.sample(index)
    assert watched.read_from == [(1, None), (3, None)]
    state = packing.state()
    watched.read_from.clear()
    watched.texts = 0
    resumed = StreamPacking(watched, tokenizer, WINDOW)
    resumed.load_state(state)
    resumed.sample(13)
    ((shard, reading),) = watched.read_from
    assert shard == 1 and (reading is not None or watched.texts < 3)
    assert watched.texts <= 2
    assert resumed.state()["of"]["3"] == state["of"]["3"]
    resumed.close()
    packing.close()


def loaders(
    documents: Documents, tokenizer: Tokenizer, ranks: int, micro: int, state: State | None = None
) -> list[Loader]:
    made = [
        Loader(
            StreamPacking(documents, tokenizer, WINDOW),
            Sequential(12),
            Causal(WINDOW, 0),
            micro_batch=micro,
            rank=rank,
            world_size=ranks,
        )
        for rank in range(ranks)
    ]
    if state is not None:
        for loader in made:
            loader.load_state(state)
    return made


def rows(world: list[Loader], step: int) -> list[tuple[int, ...]]:
    batches = [batch for loader in world for batch in loader.step(step)]
    return sorted(tuple(row) for batch in batches for row in batch["labels"].tolist())


def saved(world: list[Loader]) -> Any:
    return json.loads(json.dumps(merge(loader.state() or {} for loader in world)))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 3), (2, 3), (3, 1), (4, 3), (3, 2)])
def test_any_world_reads_the_same_steps_and_goes_on_from_any_others_state(
    corpus: Corpus, tokenizer: Tokenizer, ranks: int, micro: int
) -> None:
    source, texts = corpus
    documents = open_documents(source, 6)  # of which some worlds read shards apart, and some together
    samples = expected(texts(6), tokenizer, windows=16)
    steps = [sorted(tuple(samples[p][0]) for p in range(12 * s, 12 * s + 12)) for s in range(8)]
    world = loaders(documents, tokenizer, ranks, micro)
    assert [rows(world, step) for step in range(3)] == steps[:3]
    state = saved(world)
    assert {of["window"] for of in state["of"].values()} == {6} and len(state["of"]) == 6
    assert [rows(world, step) for step in (3, 4)] == steps[3:5]
    for loader in world:
        loader.load_state(state)  # a rollback, two steps passed over
        assert loader.state() == state
    assert [rows(world, step) for step in (5, 6)] == steps[5:7]
    other = loaders(documents, tokenizer, 2, 2, state)
    assert [rows(other, step) for step in range(3, 8)] == steps[3:]
    assert saved(other)["of"].keys() == state["of"].keys()
    for loader in world + other:
        loader.close()


def test_of_a_shard_that_two_ranks_read_the_furthest_counts() -> None:
    def state(**windows: int) -> State:
        return {"shards": 12, "window": 8, "of": {number: {"window": w} for number, w in windows.items()}}

    merged = merge([state(**{"0": 3, "10": 4}), state(**{"0": 5, "2": 1}), state(**{"10": 2})])
    assert merged == state(**{"0": 5, "2": 1, "10": 4})
    assert list(merged["of"]) == ["0", "2", "10"]


def test_a_long_document_comes_in_pieces_and_goes_on_inside_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["word after word,\n" * (PIECE // 5), "short\n", "line\n" * (PIECE // 2), "end"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    documents = open_documents(TextFiles(f"{tmp_path}/*.txt"), 2)
    end = tokenizer.token_to_id(END_OF_TEXT)
    whole = [*tokenizer.encode(texts[0]).ids, end, *tokenizer.encode(texts[2]).ids, end]
    packing = StreamPacking(documents, tokenizer, 20_000)
    found: list[int] = []
    bounds = []
    for index in range(0, 2 * (len(whole) // 20_000), 2):
        sample = packing.sample(index)
        assert sample.before[0] == (found[-1] if found else end)
        found += sample.tokens.tolist()
        bounds += (20_000 * (index // 2) + sample.bounds[1:-1]).tolist()
        state = packing.state()
        packing.load_state(state)
        assert packing.state() == state
    assert found == whole[: len(found)]
    assert bounds == [len(tokenizer.encode(texts[0]).ids) + 1]


@pytest.mark.parametrize("first", [0, 1, 5, 8])
def test_a_corpus_may_begin_at_any_sample(corpus: Corpus, tokenizer: Tokenizer, first: int) -> None:
    """As in a fork: sample `first` + i, where the shards come in their turns, is the first of its shard."""
    (source, _), shards = corpus, 3
    documents = open_documents(source, shards)
    plain = StreamPacking(documents, tokenizer, WINDOW)
    begun = StreamPacking(documents, tokenizer, WINDOW)
    begun.load_state(begun.state_at(first))
    for index in range(first, first + 2 * shards):
        number, window = index % shards, (index - first) // shards
        one, other = begun.sample(index), plain.sample(window * shards + number)
        assert one.tokens.tolist() == other.tokens.tolist() and one.bounds.tolist() == other.bounds.tolist()


def test_a_sample_is_not_read_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = Rows("json", write_jsonl(tmp_path / "a.jsonl", list(TEXTS)))
    packing = StreamPacking(open_documents(source, 2), tokenizer, WINDOW)
    packing.sample(5)
    with pytest.raises(ValueError, match="^sample 3 was read before; load a state from before it$"):
        packing.sample(3)
    for changed, line in (
        ({"shards": 4}, "^data.shards: 2, and the state to go on from is of 4; set it back$"),
        ({"window": 16}, "^data.window: 8, and the state to go on from is of 16; set it back$"),
    ):
        with pytest.raises(ValueError, match=line):
            packing.load_state(packing.state() | changed)
    packing.close()


@pytest.mark.parametrize("format", ["json", "text"])
def test_fewer_documents_than_shards_are_refused(tmp_path: Path, format: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("text")
    write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    source = Rows("json", f"{tmp_path}/a.jsonl") if format == "json" else TextFiles(f"{tmp_path}/*.txt")
    assert open_documents(source, 3).shards == 3
    with pytest.raises(
        ValueError, match="data.shards: 4 are more than the 3 documents of the corpus; set fewer$"
    ):
        open_documents(source, 4)
    with pytest.raises(ValueError, match="^data.shards: 0 is not positive"):
        open_documents(source, 0)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = Rows("json", write_jsonl(tmp_path / "a.jsonl", ["a", "", "b", None]))
    packing = StreamPacking(open_documents(empty, 2), tokenizer, WINDOW)
    packing.sample(0)
    with pytest.raises(ValueError, match="^data.shards: shard 1 of 2 holds no text; set fewer$"):
        packing.sample(1)
    path = write_jsonl(tmp_path / "b.jsonl", ["a", "b"])
    with pytest.raises(
        ValueError, match="^data.source: .*no column 'body', only n, text; set data.source.column"
    ):
        open_documents(Rows("json", path, column="body"), 1)
    numbers = StreamPacking(open_documents(Rows("json", path, column="n"), 1), tokenizer, WINDOW)
    with pytest.raises(ValueError, match="^data.source: .*column 'n' holds int; set data.source.column$"):
        numbers.sample(0)
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"te')
    with pytest.raises(ValueError, match="^data.source: .*c.jsonl, read as json: ") as error:
        open_documents(Rows("json", f"{tmp_path}/c.jsonl"), 2)
    assert "\n" not in str(error.value)


def test_a_shard_of_text_files_opens_its_own_alone(tmp_path: Path) -> None:
    for number, text in enumerate(["zero", "", "one", "two", "three"]):
        (tmp_path / f"{number}.txt").write_text(text)
    documents = open_documents(TextFiles(f"{tmp_path}/*.txt"), 2)
    for number in (0, 3):  # shard 0 has zero and two
        (tmp_path / f"{number}.txt").write_bytes(b"\xff")
    read = list(documents.read(1, None))
    assert [text.text for text in read] == ["one", "three"]
    assert [text.text for text in documents.read(1, read[0].after)] == ["three"]
    with pytest.raises(ValueError, match="0.txt: not UTF-8"):
        list(documents.read(0, None))


UNREACHED = """
import time
time.sleep = lambda seconds: None  # between the tries
from data.cli import one_line_errors
from data.documents import open_documents
from data.sources import HuggingFace
one_line_errors(open_documents)(HuggingFace("some/corpus"), 1)
"""


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", UNREACHED]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: data.source: some/corpus: Couldn't reach 'some/corpus' on the Hub")
    assert "; start again when it can be reached, or name a folder" in done.stderr
    assert done.stderr.count("\n") == 1
