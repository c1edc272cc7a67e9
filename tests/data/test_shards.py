import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data.shards import MANIFEST, NpyWriter, SplitWriter, TokenStream, token_dtype
from tests.data.conftest import StreamOf


@pytest.mark.parametrize(("vocabulary", "dtype"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_tokens_take_no_more_bytes_than_the_vocabulary_needs(vocabulary: int, dtype: type) -> None:
    assert token_dtype(vocabulary) == dtype
    assert np.array([vocabulary - 1]).astype(token_dtype(vocabulary))[0] == vocabulary - 1


@pytest.mark.parametrize("parts", [[], [0], [3, 0, 5], [1] * 20, [100_000, 7]])
def test_an_appended_file_is_an_ordinary_npy_file(tmp_path: Path, parts: list[int]) -> None:
    writer = NpyWriter(tmp_path / "a.npy", np.dtype(np.uint32))
    values = np.arange(sum(parts), dtype=np.uint32)
    start = 0
    for part in parts:
        writer.append(values[start : start + part])
        start += part
    entry = writer.close()
    assert np.array_equal(np.load(tmp_path / "a.npy"), values)
    assert np.load(tmp_path / "a.npy").dtype == np.uint32
    assert entry == {"file": "a.npy", "sha256": hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()}


def test_a_split_is_cut_into_shards_with_offsets_and_sizes(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", np.dtype(np.uint16), shard_tokens=4)
    writer.append(np.array([1, 2, 3]))
    writer.end_document(30)
    writer.append(np.arange(9))  # over two shard ends, in two parts
    writer.append(np.array([7]))
    writer.end_document(95)
    entry = writer.close()
    assert (entry["tokens"], entry["documents"], entry["bytes"]) == (13, 2, 125)
    assert [shard["tokens"] for shard in entry["shards"]] == [4, 4, 4, 1]
    for item in [*entry["shards"], entry["offsets"], entry["document_bytes"]]:
        assert hashlib.sha256((tmp_path / item["file"]).read_bytes()).hexdigest() == item["sha256"]
    assert np.load(tmp_path / "train-offsets.npy").tolist() == [0, 3, 13]
    assert np.load(tmp_path / "train-bytes.npy").tolist() == [30, 95]
    assert np.load(tmp_path / "train-00001.npy").tolist() == [1, 2, 3, 4]


def test_reads_cross_shards(stream_of: StreamOf) -> None:
    stream = stream_of(range(1, 31), shard_tokens=7)
    padded = [0, *range(1, 31)]
    for start in range(-1, 31):
        for stop in range(start, 31):
            assert stream.read(start, stop).tolist() == padded[start + 1 : stop + 1]
    assert stream.read(0, 3).dtype == np.uint16
    assert (stream.tokens, stream.documents, stream.bytes, stream.end_of_text) == (30, 1, 30, 0)
    assert stream.offsets.tolist() == [0, 30]
    for start, stop in ((-2, 1), (0, 31), (3, 2)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_a_folder_that_is_not_whole_is_refused_in_one_line(stream_of: StreamOf, tmp_path: Path) -> None:
    stream_of(range(30))
    with pytest.raises(ValueError, match="has no split validation, only train"):
        TokenStream(tmp_path, "validation")
    np.save(tmp_path / "train-00001.npy", np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match=r"train-00001.npy: holds 3 items, not 7"):
        TokenStream(tmp_path, "train")
    (tmp_path / "train-00001.npy").unlink()
    with pytest.raises(ValueError, match=r"train-00001.npy: .*prepare again"):
        TokenStream(tmp_path, "train")
    (tmp_path / MANIFEST).write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read"):
        TokenStream(tmp_path, "train")
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"manifest.json: not found"):
        TokenStream(tmp_path, "train")
