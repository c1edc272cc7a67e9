"""launch.report: the page holds the runs' numbers, shows their text as text, and loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import report as command
from launch.report import read_run, report, summary
from launch.report_events import divergence, lineage, words
from launch.report_page import count, differing, duration, si

CONFIG: dict[str, Any] = {
    "name": "a",
    "directory": "runs/a",
    "horizon": {"steps": 40},
    "model": {"width": 64, "bias": False},
    "optim": {"learning_rate": 0.001, "betas": [0.9, 0.99]},
    "engine": {"zero_stage": 2, "precision": "bf16"},
}


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    axes = {"step": step, "tokens": 100 * step, "flops": 1e12 * step, "elapsed_s": 2.5 * step}
    return {"kind": kind, **axes, **values}


def train(step: int, loss: float, tokens_per_s: float = 50.0, **values: Any) -> dict[str, Any]:
    numbers = {"learning_rate": 1e-3, "gradient_norm": 1.5, "flops_per_s": 5e11, "peak_share": 0.5}
    numbers |= {"memory_bytes": 2e9, "data_wait_share": 0.01}
    return record("train", step, loss=loss, tokens_per_s=tokens_per_s, **numbers | values)


RECORDS = [
    record("baseline", 0, gzip_bits_per_byte=3.2, xz_bits_per_byte=2.9),
    record("event", 0, event="start", message="start at step 0 of 40"),
    train(10, 3.125),
    train(20, 2.0625),
    record(
        "eval", 20, loss=2.25, perplexity=9.4877, bits_per_byte=2.4, tokens_evaluated=7, bytes_evaluated=9
    ),
    record("sample", 20, prompt="To be", text=" or not"),
    train(40, 1.75),
    record(
        "eval", 40, loss=1.8125, perplexity=6.1257, bits_per_byte=1.9, tokens_evaluated=7, bytes_evaluated=9
    ),
    record("sample", 40, prompt="To be", text=" that is"),
    record("event", 40, event="finish", message="finished 40 steps"),
]


def make_run(path: Path, records: list[dict[str, Any]] = RECORDS, config: dict[str, Any] = CONFIG) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "commit": "c0ffee" * 6,
        "dirty": False,
        "device": "A GPU",
        "world_size": 2,
        "total_steps": 40,
    }
    (path / "environment.json").write_text(json.dumps(environment))
    (path / "model.json").write_text(
        json.dumps({"parameters": 1_230_000, "parameters_without_embeddings": 999})
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


class Page(HTMLParser):
    """What a browser makes of the page: the text of elements, and all attributes that load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.data = ""
        self.text = ""
        self._in = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "action") and v]
        self._in = "data" if given.get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "data":
            self.data += data
        elif self._in not in ("script", "style"):
            self.text += data


def test_the_page_holds_the_names_and_the_curves_of_all_runs(tmp_path: Path) -> None:
    other = [train(10, 3.5), record("eval", 10, loss=3.375, perplexity=None, bits_per_byte=3.25)]
    path = report([make_run(tmp_path / "first"), make_run(tmp_path / "second", other)])
    assert path.resolve() == tmp_path.resolve() / "report.html"
    page = Page(path)
    first, second = json.loads(page.data)
    assert (first["label"], second["label"]) == ("first", "second")
    assert "first" in page.text and "second" in page.text
    assert first["train"]["loss"] == [3.125, 2.0625, 1.75]
    assert first["train"]["step"] == [10, 20, 40] and first["train"]["elapsed_s"] == [25.0, 50.0, 100.0]
    assert first["eval"]["loss"] == [2.25, 1.8125] and first["eval"]["tokens"] == [2000, 4000]
    assert first["eval"]["flops"] == [2e13, 4e13]
    assert first["baseline"]["gzip_bits_per_byte"] == 3.2 and second["baseline"] == {}
    assert second["train"]["loss"] == [3.5] and second["eval"]["perplexity"] == [None]
    assert first["color"] != second["color"]


def test_the_gradient_noise_scale_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    noise = [record("noise", step, scale=scale, trace=1.0) for step, scale in ((10, None), (20, 1500.0))]
    page = Page(report([make_run(tmp_path / "measured", [*RECORDS, *noise]), make_run(tmp_path / "plain")]))
    measured, plain = json.loads(page.data)
    assert measured["noise"]["scale"] == [None, 1500.0] and measured["noise"]["tokens"] == [1000, 2000]
    assert plain["noise"]["scale"] == []
    assert "Gradient noise scale (tokens)1.5 k–" in page.text
    alone = Page(report([tmp_path / "plain"]))
    assert "Gradient noise scale" not in alone.text


def test_the_shares_of_a_mixture_are_columns_beside_the_training_loss(tmp_path: Path) -> None:
    mixed = [
        train(10, 3.5, **{"share/web": 0.75, "share/</script>": 0.25}),
        record("eval", 10, loss=3.375),
        train(20, 3.25, **{"share/web": 0.5, "share/</script>": 0.25, "share/code": 0.25}),
    ]
    page = Page(report([make_run(tmp_path / "mixed", mixed), make_run(tmp_path / "plain")]))
    first, second = json.loads(page.data)
    assert first["shares"] == {"web": [0.75, 0.5], "</script>": [0.25, 0.25], "code": [None, 0.25]}
    assert first["train"]["step"] == [10, 20] and second["shares"] == {}


def test_the_summary_says_the_final_figures_for_people(tmp_path: Path) -> None:
    text = Page(report([make_run(tmp_path / "a")])).text
    figures = ("1.8125", "6.13", "1.900 (41% below gzip)", "3.200", "2.900", "1.23 M", "4 k", "40 TFLOP")
    shown = (
        *figures,
        "1 min 40 s",
        "50 tokens/s",
        "50.0%",
        "2 GB",
        "A GPU, 2 ranks",
        "c0ffeec0ffee",
        "finished, 40 of 40",
    )
    assert [part for part in shown if part not in text] == []


def test_an_unfinished_run_says_so_and_where_its_loss_is_from(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", RECORDS[:5] + [train(30, 2.0)])
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"kind": "train", "st')  # a killed run's last line
    text = Page(report([run])).text
    assert "unfinished, 30 of 40 steps (75%)" in text and "2.2500 (at step 20)" in text


def test_means_weigh_time_and_survive_a_resume(tmp_path: Path) -> None:
    records = [
        train(10, 3.0, tokens_per_s=100.0, peak_share=0.1, data_wait_share=0.0),  # 1,000 tokens in 10 s
        record("event", 15, event="resume", message="from a checkpoint between two records"),
        train(20, 2.5, tokens_per_s=10.0, peak_share=0.4, data_wait_share=0.3),  # 500 tokens in 50 s
    ]
    figures = summary(read_run(make_run(tmp_path / "a", records), "a"))
    assert figures["tokens_per_s"] == pytest.approx(1500 / 60)
    assert figures["peak_share"] == pytest.approx((10 * 0.1 + 50 * 0.4) / 60)
    assert figures["data_wait_share"] == pytest.approx(50 * 0.3 / 60)


def event(step: int, name: str, message: str = "", **values: Any) -> dict[str, Any]:
    return record("event", step, event=name, message=message, **values)


def test_only_what_begins_measuring_anew_shortens_what_a_record_is_about(tmp_path: Path) -> None:
    rolled = {"action": "rollback", "positions": [16, 17], "to_step": 15}
    records = [
        event(0, "start"),
        train(10, 3.0, tokens_per_s=100.0),  # 1,000 tokens in 10 s
        event(14, "spike", action="report", positions=[]),
        train(20, 2.5, tokens_per_s=10.0),  # 1,000 tokens in 100 s
        event(27, "spike", **rolled),
        train(20, 2.5, tokens_per_s=50.0),  # 500 tokens in 10 s
        event(25, "checkpoint_failed", error="no space left"),
        train(30, 2.4, tokens_per_s=50.0),  # 1,000 tokens in 20 s
        event(35, "nonfinite", **rolled),
    ]
    figures = summary(read_run(make_run(tmp_path / "a", records), "a"))
    assert figures["tokens_per_s"] == pytest.approx(3500 / 140)
    assert (figures["steps"], figures["tokens"]) == (30, 3000)  # not what was found to diverge


EVENTFUL = [
    train(10, 3.0),
    event(11, "spike", "the loss 9 at step 11", action="rollback", positions=[8, 9, 10, 11], to_step=5),
    event(15, "nonfinite", action="rollback", positions=[18, 19], to_step=10),
    event(16, "nonfinite", action="skip", positions=[20]),
    event(17, "spike", action="report", positions=[]),
    event(20, "interrupt", "SIGTERM", reason="signal"),
    event(20, "passed_over_checkpoint", "step-00000020: model.safetensors has 12 bytes"),
    event(20, "resume"),
    event(20, "converted"),
    train(20, 2.0),
    event(30, "checkpoint_failed", error="no space left"),
    event(30, "something new", "of a later version"),
]


def test_what_befell_a_run_is_in_the_table_and_marked_in_the_curve(tmp_path: Path) -> None:
    path = report([make_run(tmp_path / "a", EVENTFUL)])
    page = Page(path)
    (chart,) = json.loads(page.data)
    marks = [(mark["step"], mark["kind"], mark["words"]) for mark in chart["marks"]]
    assert marks == [
        (11, "divergence", "loss spike, rolled back"),
        (15, "divergence", "not finite, rolled back"),
        (16, "divergence", "not finite, update skipped"),
        (17, "divergence", "loss spike, only reported"),
        (20, "resume", "interrupted"),
        (20, "checkpoint", "damaged checkpoint not used"),
        (20, "resume", "resumed"),
        (20, "resume", "checkpoint converted"),
        (30, "checkpoint", "checkpoint not written"),
    ]
    first = chart["marks"][0]
    assert (first["tokens"], first["flops"], first["elapsed_s"]) == (1100, 1.1e13, 27.5)
    assert first["message"] == "the loss 9 at step 11"
    table = path.read_text().split("<h2>Events</h2>")[1].split("</table>")[0]
    said = re.findall(r"<td>(?:<span class=\"mark (\w+)\"></span>)?([^<]*)</td><td>[^<]*</td></tr>", table)
    assert said == [(kind, words) for _, kind, words in marks] + [("", "something new")]
    assert "6 batches passed over, 1 update skipped, 1 spike only reported" in page.text


def test_batches_are_counted_once_and_words_agree_in_number() -> None:
    twice = [event(9, "spike", action="rollback", positions=[7], to_step=5)] * 2
    assert divergence(twice) == "1 batch passed over"
    assert divergence([*twice, event(9, "nonfinite", action="stop")]) == "1 batch passed over, 1 stop"
    assert divergence([event(9, "resume")]) == ""
    assert words({"event": "spike"}) == "loss spike" and words({}) == "None"


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (event(20, "interrupt"), "interrupted, 20 of 40 steps (50%)"),
        (event(21, "nonfinite", action="stop"), "stopped on divergence, 20 of 40 steps (50%)"),
        (event(20, "resume"), "unfinished, 20 of 40 steps (50%)"),
    ],
)
def test_the_status_says_why_a_run_ended_early(tmp_path: Path, last: dict[str, Any], status: str) -> None:
    text = Page(report([make_run(tmp_path / "a", [*EVENTFUL[:1], train(20, 2.0), last])])).text
    assert status in text


def test_a_fork_says_where_it_comes_from(tmp_path: Path) -> None:
    fork = {"parent": "runs/a", "parent_step": 1300, "changed": ["schedule", "horizon.steps"]}
    records = [event(1300, "fork", "forked", **fork), event(1300, "resume"), train(1310, 2.0)]
    said = "forked from runs/a at step 1,300: changed schedule, horizon.steps"
    assert lineage(records) == said
    assert lineage([event(5, "fork", parent="a", parent_step=5, changed=[])]).endswith(
        "step 5: changed nothing"
    )
    parent, child = make_run(tmp_path / "a"), make_run(tmp_path / "b", records)
    both = Page(report([parent, child]))
    assert said in both.text and json.loads(both.data)[1]["train"]["step"] == [1310]
    alone = Page(report([parent])).text
    assert "Lineage" not in alone and "Divergence" not in alone


def test_what_was_not_recorded_is_left_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [train(10, 3.0, peak_share=None)])
    for name in ("environment.json", "model.json"):
        (run / name).unlink()
    figures = summary(read_run(run, "a"))
    assert figures["peak_share"] is None and figures["loss"] is None and figures["planned_steps"] == 40
    assert "unfinished, 10 of 40" in Page(report([run])).text


def test_only_differing_keys_are_in_the_table(tmp_path: Path) -> None:
    other = CONFIG | {
        "name": "b",
        "directory": "runs/b",
        "optim": {"learning_rate": 0.003, "betas": [0.9, 0.99]},
    }
    other["model"] = {"width": 64, "bias": False, "kv_heads": None}
    assert differing([CONFIG, other, CONFIG]) == {
        "optim.learning_rate": ["0.001", "0.003", "0.001"],
        "model.kv_heads": ["–", "null", "–"],
    }
    path = report([make_run(tmp_path / "a"), make_run(tmp_path / "b", config=other)])
    table = path.read_text().split("What differs in the configs")[1].split("</table>")[0]
    assert re.findall(r"<tr><th>([^<]*)</th>", table) == ["optim.learning_rate", "model.kv_heads"]


def test_samples_come_latest_first(tmp_path: Path) -> None:
    text = Page(report([make_run(tmp_path / "a")])).text
    assert text.index(" that is") < text.index(" or not") and "Step 40" in text


def test_text_from_runs_is_shown_as_text(tmp_path: Path) -> None:
    evil = "</script><script>alert('x')</script><img src=http://example.org/x>{{plotly}}"
    records = [train(10, 3.0), record("sample", 10, prompt=evil, text=evil)]
    records.append(record("event", 10, event=evil, message=evil))
    name = "<script>alert(1)<"
    runs = [
        make_run(tmp_path / name, records, CONFIG | {"seed": evil}),
        make_run(tmp_path / "plain"),
    ]
    page = Page(report(runs))
    assert page.tags.count("script") == 3 and "img" not in page.tags
    assert evil in page.text and name in page.text
    assert json.loads(page.data)[0]["label"] == name


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    path = report([make_run(tmp_path / "a")])
    page = Page(path)
    assert page.loads == ["data:,"]
    assert "Plotly.react" in path.read_text() and "plotly.js v" in path.read_text()
    assert not re.search(r"@import|url\(\s*['\"]?http", page.text)
    assert "showSendToCloud: false" in path.read_text()


def test_the_output_goes_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = make_run(tmp_path / "a"), tmp_path / "page.html"
    assert report([run, run]) == run / "report.html"  # named twice, it is one run
    assert report([run], output) == output and output.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "not a run's directory"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml: is not YAML"),
        (lambda run: (run / "config.yaml").write_text("text"), "config.yaml: is not the config"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: holds no measurement"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl: holds no measurement"),
        (lambda run: (run / "metrics.jsonl").write_text(json.dumps(RECORDS[1])), "holds no measurement"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n'),
            "line 1 is not a record",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"),
            "metrics.jsonl: holds no measurement",
        ),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json: is not JSON"),
        (lambda run: (run / "report.html").mkdir(), "report.html: cannot be written"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    tmp_path: Path,
    damage: Any,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "a")
    damage(run)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    with pytest.raises(SystemExit) as exit:
        command.main()
    said = capsys.readouterr()
    assert exit.value.code == 1 and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_last_line_is_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "a")
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    command.main()
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"


def test_numbers_are_formatted_for_people() -> None:
    assert [count(n) for n in (0, 999, 1e3, 804352, 1.23e6, 999_600, 7e9, None)] == [
        *("0", "999", "1 k", "804 k", "1.23 M", "1 M", "7 B", "–")
    ]
    assert [si(x, "FLOP") for x in (4.5e15, 12.0, 0.25, None)] == ["4.5 PFLOP", "12 FLOP", "0.25 FLOP", "–"]
    assert [duration(s) for s in (3.456, 59.9, 218, 3599.9, 7260, 200_000, None)] == [
        *("3.46 s", "59.9 s", "3 min 38 s", "1 h 0 min", "2 h 1 min", "2 d 7 h", "–")
    ]
