"""Small prepared folders and configurations for the tests of data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from data.shards import MANIFEST, SplitWriter, TokenStream

StreamOf = Callable[..., TokenStream]


@pytest.fixture
def stream_of(tmp_path: Path) -> StreamOf:
    """stream_of(tokens): a TokenStream of these tokens, cut into shards of 7; END_OF_TEXT is 0."""

    def make(tokens: list[int] | np.ndarray, shard_tokens: int = 7) -> TokenStream:
        writer = SplitWriter(tmp_path, "train", np.dtype(np.uint16), shard_tokens)
        writer.append(np.asarray(tokens, np.uint16))
        writer.end_document(len(tokens))
        manifest = {"vocabulary_size": 100, "end_of_text": 0, "splits": {"train": writer.close()}}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        return TokenStream(tmp_path, "train")

    return make


@pytest.fixture
def text_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """text_config(paths, **changes): a data configuration of text files, prepared below tmp_path."""

    def make(paths: Any, **changes: Any) -> DictConfig:
        config = {
            "name": "test",
            "source": {"_target_": "data.sources.TextFiles", "paths": paths},
            "validation": {"_target_": "data.split.ByPosition", "share": 0.1},
            "directory": str(tmp_path / "prepared"),
        }
        return OmegaConf.create(config | changes)

    return make
