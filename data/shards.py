"""Token shards on disk: what preparation writes and training maps into memory.

A prepared folder holds, for each split, a stream of tokens cut into `<split>-00000.npy`, ... (a document is
its tokens followed by END_OF_TEXT; documents run on over the ends of shards), `<split>-offsets.npy` (int64
[documents + 1], where each document starts), `<split>-bytes.npy` (int64 [documents], its UTF-8 length) and
`<split>-documents.jsonl.zst` (a line for each document: its id and what is known of it). The parts of a
mixture lie one after the other. manifest.json names all files with their hashes.
"""

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from data.sources import NOTHING
from data.split import Split

MANIFEST = "manifest.json"
REMOTE = "remote.json"  # where the shards lie that are not in the folder: see data.remote
SPLITS: tuple[Split, ...] = ("train", "validation")
SHARD_TOKENS = 2**26
MAPPED = 64
HEADER = 128  # bytes before the items of a .npy file of one dimension
FRAME = 1000  # documents whose lines are compressed together


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


class NpyWriter:
    """A one-dimensional .npy file that is appended to, so that nothing but the current piece is in memory.

    length: how many items an earlier writer left, to go on behind.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int = 0) -> None:
        self.path = path
        self.dtype = dtype
        self.length = length
        self._file = path.open("r+b" if length else "wb")
        self._write_header()  # a place holder: numpy pads headers so that the length can grow in place
        _go_on(self._file, self._file.tell() + length * dtype.itemsize)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def sync(self) -> None:
        """Have all items on the disk."""
        _sync(self._file)

    def close(self) -> dict[str, str]:
        """Finish the file; {"file": name, "sha256": hex digest of the whole file}."""
        self._file.seek(0)
        self._write_header()
        _sync(self._file)
        self._file.close()
        return _entry(self.path)

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class DocumentsWriter:
    """Writes <split>-documents.jsonl.zst, a frame for each FRAME documents, so that one can go on behind any.

    state: what an earlier writer left.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None) -> None:
        self.path = path
        self._lines: list[str] = state["lines"] if state else []
        self._file = path.open("r+b" if state else "wb")
        _go_on(self._file, state["bytes"] if state else 0)

    def append(self, line: Mapping[str, str]) -> None:
        self._lines.append(json.dumps(dict(line), ensure_ascii=False))
        if len(self._lines) == FRAME:
            self._compress()

    def state(self) -> dict[str, Any]:
        """What one needs to go on from here; what was written by then is on the disk."""
        _sync(self._file)
        return {"bytes": self._file.tell(), "lines": self._lines}

    def close(self) -> dict[str, str]:
        self._compress()
        self._file.close()
        return _entry(self.path)

    def _compress(self) -> None:
        text = "".join(f"{line}\n" for line in self._lines)
        self._file.write(zstandard.compress(text.encode("utf-8", "surrogateescape")))
        self._lines = []


class SplitWriter:
    """Writes one split of a prepared folder; at most one shard is open at a time.

    state: of an earlier writer of the same split, to go on from; what it wrote later is taken back.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        known = state or dict.fromkeys(("tokens", "documents", "bytes", "start"), 0)
        self.tokens, self.documents, self.bytes = known["tokens"], known["documents"], known["bytes"]
        self._start: int = known["start"]  # of the current document
        self._shards: list[dict[str, Any]] = known.get("shards", [])
        self._parts: dict[str, dict[str, list[int]]] = known.get("parts", {})
        self._last: int | None = known.get("last")  # the token before the next one
        self._before: int | None = known.get("before")  # the token before the open shard's first
        self._shard: NpyWriter | None = None
        if length := self.tokens - sum(shard["tokens"] for shard in self._shards):
            self._shard = NpyWriter(self._shard_path(), dtype, length)
        count = self.documents
        int64, bounds = np.dtype(np.int64), count + 1 if state else 0
        self._offsets = NpyWriter(folder / f"{split}-offsets.npy", int64, bounds)
        self._bytes = NpyWriter(folder / f"{split}-bytes.npy", int64, count)
        self._about = DocumentsWriter(folder / f"{split}-documents.jsonl.zst", known.get("about"))
        if not state:
            self._offsets.append(np.zeros(1, np.int64))

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens to the current document."""
        while len(tokens):
            if self._shard is None:
                self._shard, self._before = NpyWriter(self._shard_path(), self.dtype), self._last
            room = self.shard_tokens - self._shard.length
            self._shard.append(tokens[:room])
            self.tokens += min(room, len(tokens))
            self._last = int(tokens[:room][-1])
            tokens = tokens[room:]
            if self._shard.length == self.shard_tokens:
                self._close_shard()

    def end_document(
        self, size: int, id: str = "", about: Mapping[str, str] = NOTHING, part: str = ""
    ) -> None:
        """Close the current document, whose text had `size` bytes of UTF-8. Those of a part come in a row."""
        if part:
            first = {"documents": [self.documents, 0], "tokens": [self._start, 0]}
            bounds = self._parts.setdefault(part, first)
            bounds["documents"][1], bounds["tokens"][1] = self.documents + 1, self.tokens
        self._start = self.tokens
        self.documents += 1
        self.bytes += size
        self._offsets.append(np.array([self.tokens]))
        self._bytes.append(np.array([size]))
        self._about.append({"id": id, **about})

    def state(self) -> dict[str, Any]:
        """What one needs to go on from here (JSON); what was written by then is on the disk."""
        for writer in (self._offsets, self._bytes, *([self._shard] if self._shard else [])):
            writer.sync()
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return counts | {
            "shards": self._shards,
            "parts": self._parts,
            "start": self._start,
            "last": self._last,
            "before": self._before,
            "about": self._about.state(),
        }

    def close(self) -> dict[str, Any]:
        """Finish every file; the split's entry in the manifest."""
        if self._shard is not None:
            self._close_shard()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self._shards,
            "offsets": self._offsets.close(),
            "document_bytes": self._bytes.close(),
            "about": self._about.close(),
            "parts": self._parts,
        }

    def _shard_path(self) -> Path:
        return self.folder / f"{self.split}-{len(self._shards):05d}.npy"

    def _close_shard(self) -> None:
        assert self._shard is not None
        entry = {"tokens": self._shard.length, "before": self._before}  # before: null at the stream's start
        self._shards.append(entry | self._shard.close())
        self._shard = None


def _go_on(file: IO[bytes], size: int) -> None:
    """Stand behind the first `size` bytes of a file, which are kept. Raises ValueError where it has fewer."""
    file.flush()
    if os.fstat(file.fileno()).st_size < size:
        raise ValueError(f"{file.name}: is shorter than was noted; run the same command again to start over")
    file.truncate(size)
    file.seek(size)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _entry(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder. Raises ValueError where there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; not a prepared folder; run python -m data.prepare") from None
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete the folder and prepare again") from None


class TokenStream:
    """One split of a prepared folder, memory-mapped.

    tokens, documents, bytes: how many there are (bytes: of UTF-8 text). end_of_text: token id.
    Raises ValueError where the folder is not complete.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        manifest = read_manifest(self.folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{self.folder}: has no split {split}, only {', '.join(manifest['splits'])}")
        entry = manifest["splits"][split]
        self.tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self.bytes: int = entry["bytes"]
        self.vocabulary_size: int = manifest["vocabulary_size"]
        self.end_of_text: int = manifest["end_of_text"]
        self._offsets_file: str = entry["offsets"]["file"]
        self._dtype = token_dtype(self.vocabulary_size)
        shards = entry["shards"]
        self._starts = list(accumulate((shard["tokens"] for shard in shards), initial=0))
        # The token before each shard's first: a sample that begins there needs no other shard for it.
        self._known = {-1: self.end_of_text}
        for start, shard in zip(self._starts, shards, strict=False):
            if shard.get("before") is not None:
                self._known[start - 1] = shard["before"]
        if (self.folder / REMOTE).exists():
            from data.remote import RemoteShards  # stands on this module

            self.shards: Shards = RemoteShards(self.folder, shards, self._dtype)
        else:
            self.shards = Shards(self.folder, shards)
            self.shards.check(self._dtype.itemsize)

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: the position of each document's first token, and the end of the last."""
        return map_array(self.folder / self._offsets_file, self.documents + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start, ..., stop - 1 (uint16 or uint32). Position -1 reads as END_OF_TEXT: it is what the
        first token of the stream is predicted from. Raises IndexError outside [-1, tokens]."""
        if not -1 <= start <= stop <= self.tokens:
            raise IndexError(f"[{start}, {stop}) is outside the {self.tokens} tokens of {self.split}")
        shard = bisect_right(self._starts, start) - 1
        if 0 <= start < stop <= self._starts[shard + 1]:
            offset = self._starts[shard]
            return self.shards[shard][start - offset : stop - offset]
        parts = []
        if start in self._known and start < stop:
            parts.append(np.array([self._known[start]], self._dtype))
            start += 1
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            offset = start - self._starts[shard]
            parts.append(self.shards[shard][offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def shards_of(self, stretches: np.ndarray) -> list[int]:
        """The shards that read(start, stop) opens for the stretches int64 [n, 2], in the order of need."""
        starts, stops = stretches[stretches[:, 0] < stretches[:, 1]].T
        starts = starts + np.isin(starts, list(self._known))
        first = np.searchsorted(self._starts, starts, "right") - 1
        last = np.searchsorted(self._starts, stops - 1, "right") - 1
        spans = dict.fromkeys(zip(first.tolist(), last.tolist(), strict=True))
        return list(dict.fromkeys(shard for a, b in spans for shard in range(a, b + 1)))


class Part(TokenStream):
    """Documents first, ..., last - 1 of a stream as a stream of their own: one part of a mixture."""

    def __init__(self, stream: TokenStream, first: int, last: int) -> None:
        self.folder, self.split = stream.folder, stream.split
        self.vocabulary_size, self.end_of_text = stream.vocabulary_size, stream.end_of_text
        self._stream, self.shards = stream, stream.shards
        offsets = stream.offsets
        self._first, end = int(offsets[first]), int(offsets[last])
        self._documents = slice(first, last + 1)
        self.documents, self.tokens = last - first, end - self._first

    @property
    def offsets(self) -> np.ndarray:
        return self._stream.offsets[self._documents] - self._first

    def read(self, start: int, stop: int) -> np.ndarray:
        """As of any stream: what stands before the part is the END_OF_TEXT of another one."""
        if not -1 <= start <= stop <= self.tokens:
            raise IndexError(f"[{start}, {stop}) is outside the {self.tokens} tokens of {self.split}")
        return self._stream.read(self._first + start, self._first + stop)

    def shards_of(self, stretches: np.ndarray) -> list[int]:
        return self._stream.shards_of(self._first + stretches)


class Shards:
    """The shards of a stream, each mapped when it is first read.

    Of those mapped, the last MAPPED stay: each holds a file open, of which a process may have 1,024. Raises
    ValueError where a shard is not what its entry in the manifest says.
    """

    def __init__(self, folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.entries = entries
        self._maps: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        array = self._maps.get(index)
        return self._map(index) if array is None else array

    def check(self, itemsize: int) -> None:
        """Raises ValueError where a shard is missing or not as long as it should be."""
        with os.scandir(self.folder) as files:
            sizes = {file.name: file.stat().st_size for file in files}
        for entry in self.entries:
            if sizes.get(entry["file"]) != HEADER + itemsize * entry["tokens"]:
                map_array(self.folder / entry["file"], entry["tokens"])  # says what is wrong

    def _map(self, index: int) -> np.ndarray:
        array = map_array(self.folder / self.entries[index]["file"], self.entries[index]["tokens"])
        with self._lock:
            while len(self._maps) >= MAPPED:
                del self._maps[next(iter(self._maps))]
            self._maps[index] = array
        return array


def map_array(path: Path, length: int) -> np.ndarray:
    """A one-dimensional .npy file in memory. Raises ValueError where it holds another number of items."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; delete the folder and prepare again") from None
    if len(array) != length:
        raise ValueError(f"{path}: holds {len(array)} items, not {length}; prepare it again")
    return array.view(np.ndarray)  # slices of a memmap take several times as long to make
