"""Prepared folders at an address: equal tokens whatever the server does, each shard once, one clear line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from data import cache as caches
from data import download as downloads
from data import prefetch, remote, shards
from data.order import Order, Ordered
from data.packing import BestFit, Chunks, Joined, Packing, Readable
from data.prefetch import Prefetcher, prefetcher
from data.remote import RemoteShards, fetch
from data.shards import MANIFEST, REMOTE, Part, SplitWriter, TokenStream
from tests.data.faulty import Fault, Server, serving

SHARD = 2000  # tokens, and so 4,128 bytes
TOKENS = 10 * SHARD
NAME = "corpus-0123"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A prepared folder of ten shards, in a folder that can be served."""
    folder = tmp_path / "served" / NAME
    (folder / "tokenizer").mkdir(parents=True)
    files = {name: json.dumps({name: "x" * 5000}) for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, content in files.items():
        (folder / "tokenizer" / name).write_text(content)
    splits = {}
    for split, tokens in (("train", TOKENS), ("validation", SHARD // 2)):
        writer = SplitWriter(folder, split, np.dtype(np.uint16), SHARD)
        random = np.random.default_rng(tokens)
        while writer.tokens < tokens:
            length = min(int(random.integers(1, 30)), tokens - writer.tokens)
            writer.append(np.append(random.integers(1, 60_000, length - 1), 0).astype(np.uint16))
            writer.end_document(length)
        splits[split] = writer.close()
    manifest = {
        "vocabulary_size": 60_000,
        "end_of_text": 0,
        "splits": splits,
        "tokenizer": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[Server]:
    with serving(source.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setattr(downloads, "LEAST", 100)
    monkeypatch.setattr(downloads, "PROGRESS", 3000)


def node(tmp_path: Path, address: str, room: float = 100) -> DictConfig:
    """A data node, with room for so many shards in the cache."""
    keys: dict[str, Any] = {
        "name": "remote",
        "address": f"{address}/{NAME}",
        "directory": f"{tmp_path}/prepared",
    }
    return OmegaConf.create(keys | {"cache": f"{tmp_path}/cache", "cache_bytes": room * (2 * SHARD + 128)})


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.npy"))


def every_token(stream: TokenStream) -> np.ndarray:
    return stream.read(-1, stream.tokens)


FAULTS = {
    "none": [],
    "cut off at once": [Fault(cut=0)],
    "cut off": [Fault(cut=1000), Fault(cut=1)],
    "wrong bytes": [Fault(flip=3000)],
    "cut off and wrong before": [Fault(cut=2000, flip=1000)],
    "not now": [Fault(status=408), Fault(status=425), Fault(status=429)],
    "server errors": [Fault(status=500), Fault(status=503)],
    "hanging": [Fault(hang=True)],
    "too slow": [Fault(rate=10)],
    "slow": [Fault(rate=20_000)],
    "all": [Fault(cut=500), Fault(status=503), Fault(flip=7), Fault(rate=10)],
}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("fault", FAULTS)
def test_tokens_are_those_of_local_reading_whatever_the_server_does(
    tmp_path: Path, source: Path, server: Server, fault: str, ranges: bool
) -> None:
    local = TokenStream(source, "train")
    server.ranges = ranges
    for name in ("train-00000.npy", "train-00003.npy", MANIFEST, "tokenizer.json", "train-offsets.npy"):
        server.faults[name] = [] if fault == "none" else list(FAULTS[fault])
    server.faults[MANIFEST] = [f for f in server.faults[MANIFEST] if f.flip is None]  # nothing tells
    stream = TokenStream(fetch(node(tmp_path, server.address)), "train")
    assert isinstance(stream.shards, RemoteShards) and not cached(tmp_path)
    assert np.array_equal(every_token(stream), every_token(local))
    assert np.array_equal(stream.offsets, local.offsets)
    assert stream.read(0, 2).dtype == np.uint16
    assert not any(server.faults.values())
    assert len(cached(tmp_path)) == 10 and not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("scheme", ["file://", ""], ids=["file", "path"])
def test_any_address_that_fsspec_reads(tmp_path: Path, source: Path, scheme: str) -> None:
    stream = TokenStream(fetch(node(tmp_path, f"{scheme}{source.parent}")), "train")
    assert np.array_equal(every_token(stream), every_token(TokenStream(source, "train")))
    assert len(cached(tmp_path)) == 10


def test_a_stand_in_is_made_once_and_knows_its_cache(tmp_path: Path, server: Server) -> None:
    folder = fetch(node(tmp_path, server.address))
    assert folder == tmp_path / "prepared" / NAME
    asked = server.requests.total()
    assert set(server.requests) == {
        MANIFEST,
        *("tokenizer.json", "tokenizer_config.json"),
        *(f"{split}-{what}.npy" for split in ("train", "validation") for what in ("offsets", "bytes")),
    }
    changed = node(tmp_path, server.address, room=3)
    changed.cache = f"{tmp_path}/elsewhere"
    assert fetch(changed) == folder and server.requests.total() == asked
    TokenStream(folder, "train").read(0, 1)
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1


def test_a_folder_that_has_its_shards_is_left_as_it_is(tmp_path: Path, source: Path, server: Server) -> None:
    (tmp_path / "prepared").mkdir()
    source.rename(tmp_path / "prepared" / NAME)
    folder = fetch(node(tmp_path, server.address))
    assert len(TokenStream(folder, "train").read(0, TOKENS)) == TOKENS
    assert not server.requests and not (folder / REMOTE).exists()


def test_shards_that_are_put_into_the_folder_are_not_downloaded(
    tmp_path: Path, source: Path, server: Server
) -> None:
    folder = fetch(node(tmp_path, server.address))
    for number in (0, 3):
        (folder / f"train-{number:05}.npy").write_bytes((source / f"train-{number:05}.npy").read_bytes())
    assert np.array_equal(
        every_token(TokenStream(folder, "train")), every_token(TokenStream(source, "train"))
    )
    assert server.requests["train-00000.npy"] == server.requests["train-00003.npy"] == 0
    assert len(cached(tmp_path)) == 8


def test_another_address_must_hold_the_same_tokens(tmp_path: Path, source: Path, server: Server) -> None:
    folder = fetch(node(tmp_path, server.address))
    moved = tmp_path / "moved"
    source.parent.rename(moved)
    assert fetch(node(tmp_path, str(moved))) == folder
    assert len(TokenStream(folder, "train").read(0, TOKENS)) == TOKENS
    manifest = json.loads((moved / NAME / MANIFEST).read_text())
    manifest["splits"]["train"]["tokens"] += 1
    source.mkdir(parents=True)
    (source / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^data.address: {folder} stands in for {moved}/.*other tokens"):
        fetch(node(tmp_path, server.address))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "text"}, r"^data.column: unknown key; remote data knows name, address"),
        ({"cache_bytes": "much"}, r"^data.cache_bytes: 'much' is not a number of bytes"),
        ({"cache_bytes": 0}, r"^data.cache_bytes: 0 is not"),
        ({"address": None}, r"^data.address: None is not an address; name that of a prepared folder$"),
        (
            {"address": "nowhere://host/corpus"},
            r"^data.address: nowhere://host/corpus/manifest.json: .*[Pp]rotocol",
        ),
        (
            {"address": "/no/such/folder"},
            r"^data.address: /no/such/folder/manifest.json: No such file or directory; name a prepared",
        ),
        (
            {"address": "http://127.0.0.1:1/corpus"},
            r"^data.address: http://127.0.0.1:1/corpus/manifest.json: Connection refused"
            r" \(5 tries in a row\); start again when it can be read$",
        ),
    ],
)
def test_mistakes_in_the_node_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fetch(OmegaConf.merge(node(tmp_path, "unused"), changes))
    assert not (tmp_path / "prepared").exists()


def test_an_address_without_a_manifest_is_one_line(tmp_path: Path, source: Path, server: Server) -> None:
    (source / MANIFEST).write_text("<html>")
    with pytest.raises(ValueError, match=r"^data.address: .*/manifest.json: not a manifest; name a prepared"):
        fetch(node(tmp_path, server.address))
    (source / MANIFEST).unlink()
    line = rf"^data.address: {server.address}/{NAME}/manifest.json: HTTP Error 404.*; name a prepared folder"
    with pytest.raises(ValueError, match=line):
        fetch(node(tmp_path, server.address))
    assert server.requests[MANIFEST] == 2 and not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(flip=2000), "its SHA-256 is not that of the manifest"),
        (Fault(cut=200), "cut off after 200 of 4,128 bytes"),
        (Fault(status=503), "HTTP Error 503"),
        (Fault(hang=True), "timed out"),
        (Fault(rate=10), "fewer than 100 bytes in 0 s"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_a_shard_that_cannot_be_had_is_one_line_and_the_others_stay(
    tmp_path: Path, server: Server, fault: Fault, message: str
) -> None:
    server.ranges = False
    server.always["train-00001.npy"] = fault
    stream = TokenStream(fetch(node(tmp_path, server.address)), "train")
    whole = stream.read(0, SHARD)
    address = f"{server.address}/{NAME}/train-00001.npy"
    line = rf"^data.address: {address}: .*{message}.*5 tries.*; what is in .*/cache stays$"
    with pytest.raises(ValueError, match=line):
        stream.read(SHARD, SHARD + 5)
    assert server.requests["train-00001.npy"] == downloads.TRIES and len(cached(tmp_path)) == 1
    del server.always["train-00001.npy"]
    assert len(stream.read(SHARD, SHARD + 5)) == 5 and np.array_equal(stream.read(0, SHARD), whole)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_a_server_will_not_give_is_asked_for_once(tmp_path: Path, server: Server, status: int) -> None:
    stream = TokenStream(fetch(node(tmp_path, server.address)), "train")
    server.always["train-00001.npy"] = Fault(status=status)
    address = f"{server.address}/{NAME}/train-00001.npy"
    line = rf"^data.address: {address}: HTTP Error {status}.*; name a prepared folder.*; what is in .* stays$"
    with pytest.raises(ValueError, match=line):
        stream.read(SHARD, SHARD + 5)
    assert server.requests["train-00001.npy"] == 1


def test_a_download_that_comes_on_is_not_given_up(
    tmp_path: Path, source: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults["train-00000.npy"] = [Fault(cut=300)] * 4 + [Fault(cut=2600), *[Fault(cut=100)] * 3]
    monkeypatch.setattr(downloads, "PROGRESS", 2000)
    stream = TokenStream(fetch(node(tmp_path, server.address)), "train")
    assert np.array_equal(stream.read(0, SHARD), TokenStream(source, "train").read(0, SHARD))
    assert server.requests["train-00000.npy"] == 9
    assert server.sent["train-00000.npy"] == 2 * SHARD + 128  # by ranges: no byte twice


def test_the_cache_keeps_within_its_bytes_and_what_was_used_last(tmp_path: Path, server: Server) -> None:
    stream = TokenStream(fetch(node(tmp_path, server.address, room=4)), "train")
    for shard in (0, 1, 2, 3, 0, 4, 5):
        stream.read(shard * SHARD, shard * SHARD + 1)
        assert len(cached(tmp_path)) <= 4
    names = [shard["sha256"] for shard in stream.shards.entries]
    assert [path.stem for path in cached(tmp_path)] == sorted(names[i] for i in (3, 0, 4, 5))
    assert server.requests["train-00000.npy"] == 1


def test_what_is_in_use_stays_and_a_cache_without_room_says_so(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "ROOM_TIMEOUT", 0.1)
    folder = fetch(node(tmp_path, server.address, room=3.5))
    streams = [TokenStream(folder, "train") for _ in range(2)]
    for shard in (0, 1):
        streams[0].read(shard * SHARD, shard * SHARD + 1)
    for shard in (2, 3, 4):
        streams[1].read(shard * SHARD, shard * SHARD + 1)
    names = [shard["sha256"] for shard in streams[0].shards.entries]
    assert {names[0], names[1], names[4]} == {path.stem for path in cached(tmp_path)}
    other = TokenStream(folder, "train")
    assert not other.shards.bring(5, downloads.NEVER)  # there is no room
    assert server.requests["train-00005.npy"] == 0
    with pytest.raises(ValueError, match=r"^data.cache_bytes: 14,448 are too few, all files in .* in use"):
        other.read(7 * SHARD, 7 * SHARD + 1)
    with pytest.raises(ValueError, match=r"^data.cache_bytes: 2,064 are too few for http.* of 4,128 bytes"):
        TokenStream(fetch(node(tmp_path, server.address, room=0.5)), "train").read(0, 1)


READER = """
import sys
from data.shards import TokenStream
stream = TokenStream(sys.argv[1], "train")
print(int(stream.read(0, stream.tokens).astype(int).sum()))
"""


def reader(folder: Path) -> subprocess.Popen[str]:
    """A process that reads a stream."""
    return subprocess.Popen(
        [sys.executable, "-c", READER, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_processes_share_a_cache_and_download_each_shard_once(
    tmp_path: Path, source: Path, server: Server
) -> None:
    folder = fetch(node(tmp_path, server.address))
    shards = [f"train-{number:05}.npy" for number in range(10)]
    server.always = {name: Fault(rate=50_000) for name in shards}
    processes = [reader(folder) for _ in range(3)]
    sums = {int(process.communicate(timeout=60)[0]) for process in processes}
    assert sums == {int(TokenStream(source, "train").read(0, TOKENS).astype(int).sum())}
    assert [server.requests[name] for name in shards] == [1] * 10


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_process_killed_in_a_download_is_taken_over_from(
    tmp_path: Path, source: Path, server: Server, ranges: bool
) -> None:
    server.ranges = ranges
    folder = fetch(node(tmp_path, server.address))
    server.faults["train-00000.npy"] = [Fault(rate=4000)]
    killed = reader(folder)
    with server.changed:
        assert server.changed.wait_for(lambda: server.sent["train-00000.npy"] > 600, timeout=30)
    waiting = reader(folder)
    killed.kill()
    killed.communicate()
    expected = int(TokenStream(source, "train").read(0, TOKENS).astype(int).sum())
    assert int(waiting.communicate(timeout=60)[0]) == expected
    assert server.requests["train-00000.npy"] == 2 and len(cached(tmp_path)) == 10
    if ranges:
        assert server.sent["train-00000.npy"] < 1.5 * (2 * SHARD + 128)


def test_a_full_disk_is_one_line(tmp_path: Path, server: Server, disk: Path) -> None:
    config = node(tmp_path, server.address)
    config.cache = str(disk / "cache")
    stream = TokenStream(fetch(config), "train")
    stream.read(0, 1)
    (disk / "ballast").write_bytes(bytes(2**22 - 2**14))
    with pytest.raises(ValueError, match=rf"^data.cache: {disk}/cache: No space left on device; make room"):
        stream.read(SHARD, TOKENS)
    assert not list((disk / "cache").glob("*.part")) and (disk / "cache").glob("*.npy")
    (disk / "ballast").unlink()
    assert len(stream.read(SHARD, TOKENS)) == TOKENS - SHARD


@pytest.mark.parametrize("before", [True, False], ids=["with the token before", "without"])
def test_the_shards_of_a_stretch_are_those_that_reading_it_opens(
    tmp_path: Path, source: Path, before: bool
) -> None:
    if not before:
        manifest = json.loads((source / MANIFEST).read_text())
        for shard in manifest["splits"]["train"]["shards"]:
            shard.pop("before", None)
        (source / MANIFEST).write_text(json.dumps(manifest))
    local, random = TokenStream(source, "train"), np.random.default_rng(0)
    whole = every_token(local)
    edges = np.arange(0, TOKENS + 1, SHARD)[:, None] + [-2, -1, 0, 1]
    stretches = np.sort(random.choice(edges.clip(-1, TOKENS).ravel(), (200, 2)), axis=1)
    for start, stop in stretches.tolist():
        stream = TokenStream(source, "train")
        assert np.array_equal(stream.read(start, stop), whole[start + 1 : stop + 1])
        assert stream.shards_of(np.array([[start, stop]])) == sorted(stream.shards._maps)
    if before:
        assert local.shards_of(np.array([[SHARD - 1, SHARD + 5], [2 * SHARD - 1, 3 * SHARD]])) == [1, 2]


def test_a_stream_maps_no_shard_before_it_is_read_and_few_at_once(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAPPED", 3)
    stream = TokenStream(source, "train")
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert not stream.shards._maps
    every_token(stream)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3


def packed(stream: TokenStream, method: str) -> Packing | Joined:
    if method == "parts":
        cuts = [0, 200, 700, stream.documents]
        parts = [Part(stream, first, last) for first, last in zip(cuts[:-1], cuts[1:], strict=True)]
        return Joined([Chunks(parts[0], 100, False), BestFit(parts[1], 100), Chunks(parts[2], 100, False)])
    return Chunks(stream, 100, rest=False) if method == "chunks" else BestFit(stream, 100)


def needed(folder: Path, method: str, samples: np.ndarray) -> set[int]:
    """The shards that samples are read from, seen by reading them."""
    stream = TokenStream(folder, "train")
    packing = packed(stream, method)
    for sample in samples.tolist():
        packing.sample(sample)
    return set(stream.shards._maps)


def started(packing: Readable, order: Ordered) -> Prefetcher:
    found = prefetcher(packing, order)
    assert found is not None
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("method", ["chunks", "best fit", "parts"])
def test_the_shards_of_the_next_steps_are_brought_and_others_let_go(
    tmp_path: Path, source: Path, server: Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(prefetch, "STEPS", 4)
    local = packed(TokenStream(source, "train"), method)
    order = Order(local.samples, 8, 0, block=24)
    stream = TokenStream(fetch(node(tmp_path, server.address)), "train")
    ahead = started(packed(stream, method), order)
    try:
        for step in (0, 1, 2, 20, 3):  # onwards, and as after a restart and a rollback
            wanted = set().union(*(needed(source, method, order.step(s)) for s in range(step, step + 4)))
            ahead.at(step)
            wait_until(lambda wanted=wanted: wanted <= set(stream.shards._maps))
            assert len(set(stream.shards._maps) - wanted) <= remote.UNPLANNED  # that came late
    finally:
        ahead.close()


def test_an_epoch_brings_each_shard_once_into_a_cache_that_holds_a_part(
    tmp_path: Path, source: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "STEPS", 3)
    local = Chunks(TokenStream(source, "train"), 100, rest=False)
    order = Order(local.samples, 8, 0, block=20)
    folder = fetch(node(tmp_path, server.address, room=6))
    packing = Chunks(TokenStream(folder, "train"), 100, rest=False)
    ahead = started(packing, order)
    try:
        for step in range(local.samples // 8 - 2):  # the rest looks into the next epoch
            ahead.at(step)
            for sample in order.step(step).tolist():
                assert np.array_equal(packing.sample(sample).tokens, local.sample(sample).tokens)
            assert len(cached(tmp_path)) <= 6
    finally:
        ahead.close()
    assert [server.requests[f"train-{number:05}.npy"] for number in range(10)] == [1] * 10


def test_a_cache_too_small_for_a_step_is_one_line(tmp_path: Path, server: Server) -> None:
    packing = Chunks(TokenStream(fetch(node(tmp_path, server.address, room=6)), "train"), 100, rest=False)
    ahead = started(packing, Order(packing.samples, 50, 0))
    try:
        with pytest.raises(
            ValueError, match=r"^data.cache_bytes: step 7 reads 10 shards of 41,280 bytes, more"
        ):
            ahead.at(7)
    finally:
        ahead.close()


def test_what_cannot_be_brought_ahead_is_said_by_the_reader(tmp_path: Path, server: Server) -> None:
    server.always["train-00002.npy"] = Fault(status=503)
    packing = Chunks(TokenStream(fetch(node(tmp_path, server.address)), "train"), SHARD, rest=False)
    ahead = started(packing, Order(10, 10, 0))
    try:
        ahead.at(0)
        wait_until(lambda: len(packing.stream.shards._maps) == 9)
        with pytest.raises(ValueError, match=r"train-00002.npy: HTTP Error 503"):
            packing.sample(2)
    finally:
        ahead.close()


def test_closing_ends_a_download(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 1000)
    server.always["train-00000.npy"] = Fault(status=503)
    packing = Chunks(TokenStream(fetch(node(tmp_path, server.address)), "train"), SHARD, rest=False)
    ahead = started(packing, Order(10, 10, 0))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(packing.sample, 0)
        with server.changed:
            assert server.changed.wait_for(lambda: server.requests["train-00000.npy"] > 0, timeout=30)
        ahead.close()
        with pytest.raises(downloads.Stopped):
            reading.result(timeout=30)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_closing_one_who_looks_ahead_leaves_the_others_of_the_stream(tmp_path: Path, server: Server) -> None:
    packing = Chunks(TokenStream(fetch(node(tmp_path, server.address)), "train"), SHARD, rest=False)
    order, each = Order(10, 2, 0), prefetch.THREADS + 1
    wait_until(lambda: threads() == 0)
    closed, ahead = started(packing, order), started(packing, order)
    closed.at(0)
    closed.close()
    closed.close()  # twice does no harm
    ahead.at(3)
    needed = {shard for step in (3, 4) for shard in order.step(step).tolist()}
    wait_until(lambda: needed <= set(packing.stream.shards._maps) and threads() == each)
    assert [len(packing.sample(sample).tokens) for sample in range(10)] == [SHARD] * 10
    ahead.close()
    again = started(packing, order)  # does not wake those before
    again.at(0)
    wait_until(lambda: threads() == each)
    again.close()


def test_each_who_looks_ahead_keeps_its_own_shards(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "STEPS", 2)
    packing = Chunks(TokenStream(fetch(node(tmp_path, server.address)), "train"), SHARD, rest=False)
    order = Order(10, 1, 0)
    both = started(packing, order), started(packing, order)
    try:
        for ahead, step in zip(both, (0, 5), strict=True):
            ahead.at(step)
        wanted = {int(order.step(step)[0]) for step in (0, 1, 5, 6)}
        wait_until(lambda: wanted <= set(packing.stream.shards._maps))
        both[1].at(7)
        kept = {int(order.step(step)[0]) for step in (0, 1, 7, 8)}
        wait_until(lambda: kept == set(packing.stream.shards._maps))
    finally:
        for ahead in both:
            ahead.close()
