"""Streams of given documents."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.shards import MANIFEST, SplitWriter, TokenStream

END = 0


def write_documents(
    folder: Path, documents: Sequence[Sequence[int]], vocabulary_size: int = 60000, shard_tokens: int = 11
) -> TokenStream:
    """A training stream of documents, each given without its END_OF_TEXT (0), in many small shards."""
    writer = SplitWriter(folder, "train", np.dtype(np.uint16), shard_tokens)
    for document in documents:
        writer.append(np.array([*document, END], np.uint16))
        writer.end_document(len(document))
    manifest = {"vocabulary_size": vocabulary_size, "end_of_text": END, "splits": {"train": writer.close()}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return TokenStream(folder, "train")


def numbered(lengths: Sequence[int], first: int = 1) -> list[range]:
    """Documents of these lengths whose tokens count up through all of them: no token comes twice."""
    ends = np.cumsum([first, *lengths]).tolist()
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]
