"""The coordinate check passes a parametrization, and fails one that lacks a part."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from launch import coordinate_check
from model.attention import Attention
from tests.tiny import corpus


def own(folder: Path) -> list[str]:
    if not (folder / "text").exists():
        corpus(folder / "text")
    return [
        *("data=text", f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"),
        *("data.validation.share=0.2", "sequence_length=32", "tokenizer=bytes"),
    ]


WIDTHS = [32, 64, 128, 256]


def checked(folder: Path, *more: str, without: tuple[str, ...] = ()) -> coordinate_check.Slopes:
    return coordinate_check.check([*own(folder), *more], "width", WIDTHS, 3, 2, without)[1]


def test_mup_passes_where_the_standard_parametrization_fails(tmp_path: Path) -> None:
    mup = checked(tmp_path, "parametrization=mup")
    del mup.by_layer["change"][coordinate_check.SCORES]  # of heads too narrow yet
    assert abs(mup.worst()[0]) < 0.3  # smaller widths than those of the claim, and fewer seeds
    assert checked(tmp_path, "parametrization=standard").worst()[0] > 0.6


@pytest.mark.parametrize("part", ["rate", "logits"])
def test_a_part_that_is_missing_shows(tmp_path: Path, part: str) -> None:
    slopes = checked(tmp_path, "parametrization=mup", without=(part,))
    assert abs(slopes.worst()[0]) > 0.5 and not slopes.passed


def test_scores_grow_faster_without_their_part(tmp_path: Path) -> None:
    """By the root of the width that it divides by, and what then changes faster."""
    grown = [
        checked(tmp_path, "parametrization=mup", without=without).by_layer["change"][coordinate_check.SCORES][
            0
        ]
        for without in ((), ("scores",))
    ]
    assert 0.45 < grown[1] - grown[0] < 1


def test_the_scores_that_are_seen_are_those_of_the_softmax() -> None:
    torch.manual_seed(0)
    layer = Attention(width=16, heads=4, kv_heads=2, bias=False, residual_std=0.02, scale=0.3)
    x = torch.randn(2, 5, 16)
    seen: list[Tensor] = []
    with coordinate_check.watched(seen.append):
        out = layer(x)
    (scores,) = seen
    assert scores.shape == (2, 4, 15)  # of a query and what comes before it, itself included
    heads = layer.qkv(x).unflatten(-1, (-1, 4))
    query, key = heads[1, 3, 2], heads[1, 2, 4 + 2 // 2]
    expected = 0.3 * (query @ key)
    assert scores[1, 2, 3 * 4 // 2 + 2].item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(out, layer(x))


def test_the_command_writes_a_page_and_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--depths", "2", "3", "--steps", "2", "--seeds", "1", "--directory", f"{tmp_path}/out"]
    argv = ["coordinate_check", *given, *own(tmp_path), "parametrization=completep", "model.width=32"]
    with mock.patch("sys.argv", argv), suppress(SystemExit):  # of 1, where two sizes do not pass
        coordinate_check.main()
    assert "steepest slope" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "slopes.json").read_text())
    assert content["layers"] == [2, 3]
    layers = content["slopes"]["change"]
    assert {"embedding", "blocks.0.attention", "blocks.last.feedforward", "logits", "scores"} < layers.keys()
    assert not any(".1." in layer or ".2." in layer for layer in layers)
    assert "<html" in (tmp_path / "out" / "report.html").read_text()[:200]


def test_sizes_that_make_no_slope_are_refused() -> None:
    with (
        mock.patch("sys.argv", ["coordinate_check", "--widths", "64"]),
        pytest.raises(ValueError, match="^--widths: give two sizes or more"),
    ):
        coordinate_check.main()


def test_a_layer_that_diverged_or_stood_still_does_not_pass() -> None:
    slopes = coordinate_check.Slopes({"size": {"a": [0.01], "b": [float("nan")]}, "change": {"a": [0.02]}})
    assert not slopes.passed and slopes.worst()[2] == "b"


def test_depths_need_a_parametrization_of_depth(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^--depths: muP keeps the depth; choose parametrization=completep"):
        coordinate_check.check([*own(tmp_path), "parametrization=mup"], "layers", [1, 2], 2, 1, ())
