"""Token shards on disk: what preparation writes and training maps into memory.

A prepared folder holds, for each split, a stream of tokens cut into `<split>-00000.npy`, ... (a document is
its tokens followed by END_OF_TEXT; documents run on over the ends of shards), `<split>-offsets.npy` (int64
[documents + 1], where each document starts) and `<split>-bytes.npy` (int64 [documents], its UTF-8 length).
manifest.json names them all with their hashes.
"""

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**16 else np.uint32)


class NpyWriter:
    """A one-dimensional .npy file that is appended to, so that nothing but the current piece is in memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self.length = 0
        self._file = path.open("wb")
        self._write_header()  # a place holder: numpy pads headers so that the length can grow in place

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def close(self) -> dict[str, str]:
        """Finish the file; {"file": name, "sha256": hex digest of the whole file}."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": digest}

    def _write_header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class SplitWriter:
    """Writes one split of a prepared folder; at most one shard is open at a time."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = self.bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._shard: NpyWriter | None = None
        self._offsets = NpyWriter(folder / f"{split}-offsets.npy", np.dtype(np.int64))
        self._bytes = NpyWriter(folder / f"{split}-bytes.npy", np.dtype(np.int64))
        self._offsets.append(np.zeros(1, np.int64))

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens to the current document."""
        while len(tokens):
            if self._shard is None:
                path = self.folder / f"{self.split}-{len(self._shards):05d}.npy"
                self._shard = NpyWriter(path, self.dtype)
            room = self.shard_tokens - self._shard.length
            self._shard.append(tokens[:room])
            self.tokens += min(room, len(tokens))
            tokens = tokens[room:]
            if self._shard.length == self.shard_tokens:
                self._close_shard()

    def end_document(self, size: int) -> None:
        """Close the current document, whose text had `size` bytes of UTF-8."""
        self.documents += 1
        self.bytes += size
        self._offsets.append(np.array([self.tokens]))
        self._bytes.append(np.array([size]))

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
        }

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append({"tokens": self._shard.length} | self._shard.close())
        self._shard = None


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
        self._shards = [self._map(shard["file"], shard["tokens"]) for shard in entry["shards"]]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: the position of each document's first token, and the end of the last."""
        return self._map(self._offsets_file, self.documents + 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start, ..., stop - 1 (uint16 or uint32). Position -1 reads as END_OF_TEXT: it is what the
        first token of the stream is predicted from. Raises IndexError outside [-1, tokens]."""
        if not -1 <= start <= stop <= self.tokens:
            raise IndexError(f"[{start}, {stop}) is outside the {self.tokens} tokens of {self.split}")
        parts = []
        if start == -1 and stop > start:
            parts.append(np.array([self.end_of_text], self._shards[0].dtype))
            start = 0
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            offset = start - self._starts[shard]
            parts.append(self._shards[shard][offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else self._shards[0][:0]

    def _map(self, file: str, length: int) -> np.ndarray:
        path = self.folder / file
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}; delete the folder and prepare again") from None
        if len(array) != length:
            raise ValueError(f"{path}: holds {len(array)} items, not {length}; prepare it again")
        return array
