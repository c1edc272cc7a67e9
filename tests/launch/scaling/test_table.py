"""Tables of runs: what is read, derived, refused and written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from launch.scaling.table import clustered, points, read, write

GOOD = "parameters,tokens,loss\n1e6,2e7,4.0\n2e6,3e7,3.5\n"


def table(tmp_path: Path, text: str, name: str = "runs.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_columns_by_their_own_names_and_what_is_derived(tmp_path: Path) -> None:
    text = "run,Model Size,Training FLOP,final,width,note\na,1e6,1.2e14,4,64,x\nb,2e6,3.6e14,3.5,96,\n"
    names = {"name": "run", "parameters": "Model Size", "flops": "Training FLOP", "loss": "final"}
    runs = read(table(tmp_path, text), names)
    assert runs.names == ["a", "b"]
    assert runs.tokens.tolist() == [2e7, 3e7]
    assert runs.loss.tolist() == [4, 3.5]
    assert runs.unique_tokens is None and runs.shared == {} and runs.notes == ()
    assert {key: values.tolist() for key, values in runs.extra.items()} == {"width": [64, 96]}


def test_flops_come_from_six_n_d(tmp_path: Path) -> None:
    assert read(table(tmp_path, GOOD)).flops.tolist() == [6 * 1e6 * 2e7, 6 * 2e6 * 3e7]


def test_own_names_of_further_columns(tmp_path: Path) -> None:
    text = "parameters,tokens,loss,N without\n1e6,2e7,4,9e5\n"
    runs = read(table(tmp_path, text), {"parameters_without_embeddings": "N without"})
    assert runs.extra["parameters_without_embeddings"].tolist() == [9e5]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    n, d = random.uniform(1e6, 1e9, (2, 20))
    runs = points(
        n,
        d,
        random.uniform(2, 5, 20),
        budget=np.repeat([1e15, 3e15], 10),
        unique_tokens=d / 3,
        names=[f"run, {i}" for i in range(20)],
        extra={"parameters_without_embeddings": n / 2},
        shared={"tokenizer": "bpe", "data": "corpus"},
    )
    write(tmp_path / f"t.{suffix}", runs)
    again = read(tmp_path / f"t.{suffix}")
    for key in ("parameters", "tokens", "flops", "loss", "budget", "unique_tokens"):
        assert np.array_equal(getattr(again, key), getattr(runs, key)), key
    assert again.names == runs.names and again.shared == runs.shared
    assert np.array_equal(again.extra["parameters_without_embeddings"], n / 2)


@pytest.mark.parametrize("lost", ["nan", "inf", ""])
def test_diverged_runs_are_left_out_by_name(tmp_path: Path, lost: str) -> None:
    text = f"name,parameters,tokens,loss\na,1e6,2e7,4.0\nboom,2e6,,{lost}\nc,3e6,4e7,3.2\n"
    runs = read(table(tmp_path, text))
    assert runs.names == ["a", "c"] and runs.loss.tolist() == [4.0, 3.2]
    (note,) = runs.notes
    assert note.startswith("1 of 3 runs have no finite loss") and note.endswith("boom")


def test_a_lost_run_of_a_json_table(tmp_path: Path) -> None:
    rows = [{"parameters": 1e6, "tokens": 2e7, "loss": 4.0}, {"parameters": 2e6, "tokens": 2e7, "loss": None}]
    runs = read(table(tmp_path, json.dumps(rows), "t.json"))
    assert len(runs) == 1 and len(runs.notes) == 1


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = "".join(f"{name},1e6,{tokens}e7,4\n" for tokens, name in enumerate(("x", "x", "x (2)", "x"), 1))
    names = read(table(tmp_path, "name,parameters,tokens,loss\n" + rows)).names
    assert names == ["x (1)", "x (3)", "x (2)", "x (4)"]


def test_no_more_unique_tokens_than_tokens(tmp_path: Path) -> None:
    text = "parameters,tokens,loss,unique_tokens\n1e6,2e7,4,5e7\n1e6,2e7,4,5e6\n"
    unique = read(table(tmp_path, text)).unique_tokens
    assert unique is not None and unique.tolist() == [2e7, 5e6]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "parameters,tokens\n1e6,2e7\n",
            {},
            "no column 'loss'; name it in columns; the file has",
        ),
        ("tokens,loss\n2e7,4\n", {}, "no column 'parameters'"),
        ("parameters,loss\n1e6,4\n", {}, "no column 'tokens' and none 'flops'"),
        (GOOD, {"loss": "final loss"}, "no column 'final loss', which columns names for loss"),
        (GOOD, {"tokeniser": "loss"}, "columns names tokeniser, which is no column of ours; there are name,"),
        (
            "parameters,tokens,loss,flops\n1e6,2e7,4,1\n",
            {},
            "run 1 has 5e-14 FLOP for each parameter and token, where about 6 are spent",
        ),
        (GOOD.replace("3.5", "low"), {}, "run 2: 'loss' is 'low', not a positive number"),
        (GOOD.replace("3.5", "-1"), {}, "run 2: 'loss' is '-1', not a positive number"),
        (GOOD.replace("2e6", "0"), {}, "run 2: 'parameters' is '0', not a positive number"),
        (GOOD.replace("3e7", "nan"), {}, "run 2: 'tokens' is 'nan', not a positive number"),
        (GOOD.replace("3e7", ""), {}, "run 2: 'tokens' is '', not a positive number"),
        (GOOD.replace("3e7,", ""), {}, "line 3 has not as many values as the header, 3"),
        ("parameters,tokens,loss\n1e6,2e7,nan\n", {}, "no run has a finite loss"),
        ("parameters,tokens,loss\n", {}, "holds no run"),
        ("", {}, "holds no run"),
        (
            "parameters,tokens,loss,tokenizer\n1e6,2e7,4,bpe\n2e6,2e7,4,char\n",
            {},
            "column 'tokenizer' holds bpe, char: losses under different tokenizer do not compare",
        ),
        (
            "parameters,tokens,loss,corpus\n1e6,2e7,4,web\n2e6,2e7,4,code\n",
            {"data": "corpus"},
            "column 'corpus' holds code, web",
        ),
    ],
)
def test_what_is_no_table_is_refused_in_a_line(
    tmp_path: Path, text: str, columns: dict[str, str], message: str
) -> None:
    path = table(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}") as error:
        read(path, columns)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "{", "not a .json file"),
        ("t.json", '{"loss": 1}', "not a list of runs"),
        ("t.json", "[1, 2]", "not a list of runs"),
        ("t.json", '[{"parameters": true, "tokens": 1, "loss": 2}]', "'parameters' is True"),
        ("t.json", '[{"parameters": 1, "loss": 2, "tokens": 3}, {"parameters": 1, "loss": 2}]', "is None"),
        ("t.parquet", "", "a table is a .csv or a .json file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(table(tmp_path, text, name))


def test_budgets_are_found_among_scattered_runs() -> None:
    random = np.random.default_rng(1)
    nominal = np.repeat([6e18, 1e19, 3e19, 6e19], 12)
    flops = nominal * np.exp(random.uniform(-0.09, 0.09, len(nominal)))
    strays = np.array([1.5e19, 2.0e19, 4.3e19])
    budgets = clustered(np.concatenate([flops, strays]))
    for budget in np.unique(nominal):
        (found,) = np.unique(budgets[:48][nominal == budget])
        assert found == pytest.approx(budget, rel=0.05)
    assert budgets[48:].tolist() == strays.tolist()


def test_runs_of_a_budget() -> None:
    runs = points([1, 2, 1, 2], [8, 4, 16, 8], [4, 3, 3, 2])
    assert [(budget, list(group.names)) for budget, group in runs.isoflops()] == [
        (48, ["1", "2"]),
        (96, ["3", "4"]),
    ]


def test_the_highest_losses_are_dropped_and_the_order_kept() -> None:
    runs = points([1, 2, 3, 4], [1, 2, 3, 4], [5, 2, 9, 3], names=["a", "b", "c", "d"])
    assert runs.without_highest(2).names == ["b", "d"]


def test_selection_takes_every_column() -> None:
    runs = points([1, 2, 3], [4, 5, 6], [3, 2, 1], unique_tokens=[1, 2, 3], extra={"width": np.arange(3)})
    for chosen in (np.array([True, False, True]), [0, 2]):
        some = runs.select(chosen)
        assert some.names == ["1", "3"] and some.extra["width"].tolist() == [0, 2]
        assert some.unique_tokens is not None and some.unique_tokens.tolist() == [1, 3]
        assert some.flops.tolist() == [24, 108]


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        ([1e6, 2e6], [1e7, 2e7], "the law needs 3 runs or more and the table has 2; add runs"),
        ([1e6] * 4, [1e7, 2e7, 3e7, 4e7], "different numbers of parameters or more, and the table has 1e"),
        ([1e6, 1.00001e6, 1.00002e6], [1e7, 2e7, 3e7], "parameters or more, and the table has 1e+06 alone"),
        ([1e6, 2e6, 3e6], [1e7] * 3, "different numbers of tokens or more, and the table has 1e"),
    ],
)
def test_runs_that_fix_no_law(sizes: list[float], tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        points(sizes, tokens, np.ones(len(sizes))).require(3, "the law")
