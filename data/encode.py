"""Documents to tokens on disk, with all cores and flat memory; a killed process is gone on from."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from data.files import write
from data.heldout import HeldOutCompression
from data.shards import SPLITS, SplitWriter, token_dtype
from data.sources import PIECE, Document
from data.split import Split
from data.tokenizer import END_OF_TEXT, UNKNOWN, vocabulary_size

BATCH = 4 * PIECE * (os.cpu_count() or 1)  # characters encoded in one call
NOTED = 2**26  # characters after which it is noted how far the files go
PROGRESS = "progress.json"  # the note: how many items are in the files, and what is needed to go on
CHECKED_CHARACTERS = 2**20  # the first of the corpus are decoded again,
CHECKED_EVERY = 64  # and then every so manieth document or piece

Item = tuple[Split, Document]
T = TypeVar("T")
R = TypeVar("R")


class RoundTrip:
    """Decodes a sample of what was encoded: the first CHECKED_CHARACTERS of the corpus, then one document, or
    piece of a long one, in CHECKED_EVERY. `checked` and `unequal` count documents and pieces.

    Raises ValueError where a tokenizer that must be lossless gives another text back, other than by an
    UNKNOWN token, which says by itself what is lost.
    """

    def __init__(self, tokenizer: Tokenizer, lossless: bool) -> None:
        self.tokenizer = tokenizer
        self.lossless = lossless
        self.unknown = tokenizer.token_to_id(UNKNOWN)
        self.checked = self.unequal = self._seen = self._characters = 0

    def state(self) -> list[int]:
        return [self.checked, self.unequal, self._seen, self._characters]

    def load_state(self, state: list[int]) -> None:
        self.checked, self.unequal, self._seen, self._characters = state

    def look(self, document: Document, ids: np.ndarray) -> None:
        self._seen += 1
        self._characters += len(document.text)
        if self._characters > CHECKED_CHARACTERS and self._seen % CHECKED_EVERY:
            return
        self.checked += 1
        if self.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == document.text:
            return
        self.unequal += 1
        if self.lossless and not (self.unknown is not None and self.unknown in ids):
            raise ValueError(f"tokenizer: decodes document {document.id} to another text; choose another one")


def write_splits(
    items: Iterable[Item],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    lossless: bool,
    passed: Callable[[Document], object],
    splits: Sequence[Split] = SPLITS,
) -> dict[str, Any]:
    """Encode every document and write its split into `folder`, from where a killed process left off.

    passed: called with each document once it is written. Returns {"splits": their entries in the manifest,
    "round_trip": {"checked", "unequal"}}. Raises ValueError where a split gets no text.
    """
    dtype = token_dtype(vocabulary_size(tokenizer))
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype)
    known = _progress(folder)
    states = known["writers"] if known else dict.fromkeys(splits)
    writers = {split: SplitWriter(folder, split, dtype, state=states[split]) for split in splits}
    sizes: dict[str, int] = known["sizes"] if known else dict.fromkeys(splits, 0)
    check = RoundTrip(tokenizer, lossless)
    compression = HeldOutCompression()
    done, unnoted = 0, 0  # items in the files; characters of them that are not yet noted
    digest = hashlib.blake2b()  # of all items in the files
    items = iter(items)
    if known:
        check.load_state(known["check"])
        for split, document in islice(items, known["items"]):
            _digest(digest, split, document)
            if split == "validation":
                compression.add(document.text)
            passed(document)
            done += 1
        if [done, digest.hexdigest()] != [known["items"], known["digest"]]:
            raise ValueError(
                "data.source: gives other text than before the preparation was interrupted; run the same"
                " command again to start over"
            )

    def encode(batch: list[Item]) -> list[np.ndarray]:
        # Arrays at once: the library's own encodings take a hundred bytes and more per token.
        texts = [document.text for _, document in batch]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    for batch, encoded in _mapped(encode, _batches(items)):
        for (split, document), ids in zip(batch, encoded, strict=True):
            check.look(document, ids)
            _digest(digest, split, document)
            writers[split].append(ids)
            sizes[split] += len(document.text.encode())
            if split == "validation":
                compression.add(document.text)
            if document.ends:
                writers[split].append(end)
                writers[split].end_document(sizes[split], document.id, document.about, document.part)
                sizes[split] = 0
            passed(document)
            unnoted += len(document.text)
        done += len(batch)
        if unnoted >= NOTED:
            unnoted = 0
            states = {split: writer.state() for split, writer in writers.items()}
            progress = {"items": done, "digest": digest.hexdigest(), "writers": states, "sizes": sizes}
            write(folder / PROGRESS, json.dumps(progress | {"check": check.state()}))
    entries = {split: writer.close() for split, writer in writers.items()}
    entries["validation"] |= compression.close()
    _refuse_empty(entries)
    return {"splits": entries, "round_trip": {"checked": check.checked, "unequal": check.unequal}}


def _digest(digest: Any, split: Split, document: Document) -> None:
    rest = [split, document.id, document.ends, sorted(document.about.items()), document.part]
    for text in (json.dumps(rest), document.text):
        digest.update(text.encode("utf-8", "surrogateescape"))


def forget_progress(folder: Path) -> None:
    """All is done, and written down elsewhere."""
    for path in (folder / PROGRESS, *folder.glob(f".{PROGRESS}*")):  # those of killed processes, too
        path.unlink(missing_ok=True)


def _progress(folder: Path) -> dict[str, Any] | None:
    path = folder / PROGRESS
    return json.loads(path.read_text()) if path.exists() else None


def _refuse_empty(entries: Mapping[Split, Any]) -> None:
    if not any(entry["documents"] for entry in entries.values()):
        raise ValueError("data.source: the corpus is empty; name a source that holds text")
    for split, entry in entries.items():
        if not entry["documents"]:
            raise ValueError(
                f"data.validation: no text falls to {split}; change the share, or for a corpus of few "
                "documents set data.validation._target_=data.split.ByPosition"
            )


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _mapped(function: Callable[[T], R], items: Iterable[T], ahead: int = 2) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order, `ahead` of them worked on while the caller reads and writes.

    Two at once, so that the cores do not stand idle while the last text of a batch is encoded.
    """
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="encode")
    pending: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > ahead:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
