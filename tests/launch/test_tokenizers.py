"""The tokenizer study: its figures against a direct computation, and the whole of it at the smallest size."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file

from data.shards import TokenStream
from data.sources import Document
from data.split import ByDocument
from data.tokenizer import BPE, Characters, WordPiece, load_tokenizer
from launch.evaluate import evaluate_run
from launch.overrides import refuse
from launch.tokenizer_page import finding, lines, page
from launch.tokenizer_text import Piece, Sample, held_out, source_of, speeds, spelled, used_share
from launch.tokenizers import OWN, Study, study, table
from tests.data.documents import write_documents
from tests.tiny import ROOT, corpus
from train.checkpoint import WEIGHTS, path_of

KEYS = ["algorithms=[bpe,characters]", "sizes=[300,340]", "steps=2", "seeds=1", "context_bytes=48"]


class Texts:
    """A source of given documents. known: whether it tells its size."""

    def __init__(self, documents: list[Document], known: bool = True) -> None:
        self.given = documents
        self.known = known

    def documents(self) -> Iterator[Document]:
        return iter(self.given)

    def inputs(self) -> dict[str, Any]:
        return {"n": len(self.given)}

    def size(self) -> int | None:
        return sum(len(document.text.encode()) for document in self.given) if self.known else None


def many(count: int = 2000) -> list[Document]:
    return [Document(f"{i % 4}/{i}", "é" * 50) for i in range(count)]


def test_a_sample_is_from_everywhere_and_about_as_large_as_asked() -> None:
    sample = Sample(Texts(many()), 50_000)  # of 200,000
    found = list(sample.documents())
    assert found == list(sample.documents())
    assert 40_000 < sum(len(document.text.encode()) for document in found) < 60_000
    assert {document.id[0] for document in found} == {"0", "1", "2", "3"}
    # What is held out is an equal share of it: not chosen by the same hash.
    split = [part for part, _ in ByDocument(0.2).split(sample)]
    assert 0.15 < split.count("validation") / len(split) < 0.25
    assert sample.size() == 50_000 and sample.inputs() == {"n": 2000}


def test_pieces_of_a_long_document_are_chosen_one_by_one() -> None:
    long = [Document("long", "a" * 100, ends=i == 999) for i in range(1000)]
    found = list(Sample(Texts(long), 20_000).documents())
    assert 150 < len(found) < 250 and all(document.ends for document in found)


def test_of_a_source_without_a_size_the_sample_is_the_beginning() -> None:
    documents = [Document("a", "xx"), Document("b", "y" * 10, ends=False), Document("b", "z")]
    found = list(Sample(Texts(documents, known=False), 3).documents())
    assert found == [documents[0], documents[1]._replace(ends=True)]
    assert list(Sample(Texts(documents), 10**6).documents()) == documents
    assert Sample(Texts(documents), 10**6).size() == 13


def test_held_out_text_has_a_source_and_a_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.tokenizer_text.guesses_languages", lambda: False)
    about = {"source": "books", "language": "fr"}
    documents = [Document(f"web/{i}", "text", about=about if i % 2 else {}) for i in range(100)]
    pieces = held_out(Texts(documents), ByDocument(0.5), 10**6)
    assert 30 < len(pieces) < 70
    assert {(piece.source, piece.language) for piece in pieces} == {("books", "fr"), ("web", "unknown")}
    assert len(held_out(Texts(documents), ByDocument(0.5), 13)) == 4  # pieces of 4 bytes
    assert [source_of(Document(id, "")) for id in ("a/b/c", "a", "/a")] == ["a", ".", "."]


def test_a_language_that_is_not_told_is_guessed() -> None:
    pytest.importorskip("py3langid")
    greek = Document("a", "Το πανεπιστήμιο ιδρύθηκε τον δέκατο ένατο αιώνα και είναι γνωστό.")
    english = Document("b", "The university was founded in the nineteenth century and is well known.")
    pieces = held_out(Texts([greek, english]), ByDocument(1 - 1e-9), 10**6)
    assert [piece.language for piece in pieces] == ["el", "en"]


def test_what_is_spelled() -> None:
    training = ["the cat sat on the mat"] * 20

    def of(recipe: Any, text: str) -> int:
        tokenizer = recipe.train(training)
        return spelled(tokenizer, text, tokenizer.encode(text, add_special_tokens=False))

    assert of(BPE(300), "the cät, The mat") == len("the cät, The mat".encode())
    assert of(Characters(), "the cät, The mat") == len("the ct he mat")  # ä, comma and T were never seen
    assert of(WordPiece(100), "the cat, The mat") == len("thecatmat")  # white space and the capital are lost


def test_the_used_share_leaves_special_tokens_out(tmp_path: Path) -> None:
    stream = write_documents(tmp_path, [[3, 4, 3], [9]], vocabulary_size=12)
    assert used_share(stream, [0, 1]) == 3 / 10


def test_speeds_are_beside_the_first() -> None:
    tokenizers = [BPE(300).train(["a b c"]), BPE(300).train(["a b c"])]
    rounds: list[int] = []
    found = speeds(tokenizers, [Piece("a b c " * 100, ".", "en")], lambda: rounds.append(1))
    assert found[0][1] == 1 and len(rounds) == 4
    assert all(speed > 0 and ratio > 0 for speed, ratio in found)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("study")
    corpus(folder / "text")
    paths = [f"data.source.paths={folder}/text/*.txt", f"data.directory={folder}/prepared"]
    small = ["model.layers=1", "model.width=32", "model.heads=2", "global_batch=4", "engine.threads=1"]
    validation = ["data.validation._target_=data.split.ByDocument", "data.validation.share=0.3"]
    return ["data=text", *paths, *validation, *small, *KEYS, "name=tiny", f"directory={folder}/out"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.tokenizers", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def results(arguments: list[str]) -> dict[str, Any]:
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^3/3 (bpe-300|bpe-340|characters)-0: validation loss \d", done.stdout, re.MULTILINE)
    assert re.search(r"^bpe-340 +\d+ ", done.stdout, re.MULTILINE)
    folder = Path(arguments[-1].removeprefix("directory="))
    assert "Tokenizers on text" in (folder / "report.html").read_text()
    return json.loads((folder / "results.json").read_text())


def test_the_figures_are_those_of_a_direct_computation(results: dict[str, Any]) -> None:
    assert [own["name"] for own in results["tokenizers"]] == ["bpe-300", "bpe-340", "characters"]
    for own in results["tokenizers"]:
        run = Path(own["runs"][0]["directory"])
        tokenizer = load_tokenizer(run / "tokenizer")
        prepared = Path(json.loads((run / "data.json").read_text())["prepared"])
        train, validation = TokenStream(prepared, "train"), TokenStream(prepared, "validation")
        assert own["vocabulary_size"] == tokenizer.get_vocab_size() == train.vocabulary_size
        ids = validation.read(0, validation.tokens)
        texts = [tokenizer.decode(ids[ids != 0].tolist())]
        assert results["held_out"]["bytes"] == validation.bytes == len(texts[0].encode())
        # A document has one end-of-text token, which is none of the text's.
        assert own["bytes_per_token"] == pytest.approx(
            validation.bytes / (validation.tokens - validation.documents)
        )
        assert own["by_source"] == {".": pytest.approx(own["bytes_per_token"])}
        seen = set(np.unique(train.read(0, train.tokens)).tolist()) - {0}
        special = 1 if own["algorithm"] == "bpe" else 2
        assert own["used_share"] == len(seen) / (own["vocabulary_size"] - special)
        assert (own["spelled_share"], own["unknown_share"], own["lossless"]) == (1, 0, True)
        assert own["sequence_length"] == round(48 * train.tokens / train.bytes)
        per_step = 4 * own["sequence_length"] * train.bytes / train.tokens
        assert own["bytes_seen"] == pytest.approx(2 * per_step)


def test_bits_per_byte_and_parameters_are_those_of_the_trained_model(results: dict[str, Any]) -> None:
    for own in results["tokenizers"]:
        (trained,) = own["runs"]
        run = Path(trained["directory"])
        evaluation = evaluate_run(run)
        assert trained["bits_per_byte"] == pytest.approx(evaluation.bits_per_byte, rel=1e-3)  # bf16, fp32
        nats = evaluation.loss * evaluation.tokens_evaluated
        assert evaluation.bits_per_byte == pytest.approx(
            nats / math.log(2) / results["held_out"]["bytes"], rel=1e-6
        )
        weights = load_file(path_of(run / "checkpoints", 2) / WEIGHTS)
        assert trained["parameters"] == sum(weight.numel() for weight in weights.values())
        tables = own["vocabulary_size"] * 32
        assert trained["parameters"] - trained["parameters_without_embeddings"] == tables


def test_what_is_there_is_not_trained_again(arguments: list[str], results: dict[str, Any]) -> None:
    metrics = [Path(own["runs"][0]["directory"]) / "metrics.jsonl" for own in results["tokenizers"]]
    before = [path.stat().st_mtime_ns for path in metrics]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("tokenizers", overrides=arguments)
    again = study(node, Console(quiet=True))
    assert [path.stat().st_mtime_ns for path in metrics] == before
    assert [own["runs"] for own in again["tokenizers"]] == [own["runs"] for own in results["tokenizers"]]


def made(name: str, bits: list[float], lossless: bool = True) -> dict[str, Any]:
    algorithm, _, size = name.partition("-")
    counts = {"parameters": 5000, "parameters_without_embeddings": 1000, "flops": 1e9, "bytes_evaluated": 99}
    return {
        "name": name,
        "algorithm": algorithm,
        "size": int(size) if size else None,
        "vocabulary_size": int(size or 100),
        "lossless": lossless,
        "bytes_per_token": 2.0,
        "by_source": {"<script>": 2.5 if name == "bpe-300" else 3.5, "trace": 1.0},
        "by_language": {"en": 2.0},
        "spelled_share": 0.99999,
        "unknown_share": 0.0,
        "used_share": 0.5,
        "megabytes_per_s": 3.0,
        "relative_speed": 1.0,
        "sequence_length": 24,
        "bytes_seen": 1000.0,
        "runs": [{"bits_per_byte": value, **counts} for value in bits],
    }


def made_results(*tokenizers: dict[str, Any]) -> dict[str, Any]:
    sources = {"<script>": 995, "trace": 5}
    return {
        "settings": {"steps": 2, "seeds": len(tokenizers[0]["runs"]), "context_bytes": 48},
        "run": {"global_batch": 4, "data": {"name": "<b>"}},
        "held_out": {
            "bytes": 1000,
            "by_source": sources,
            "by_language": {"en": 1000},
            "languages_guessed": True,
        },
        "tokenizers": list(tokenizers),
    }


@pytest.mark.parametrize(
    ("tokenizers", "words"),
    [
        ([made("bpe-300", [2.0, 2.2]), made("bpe-400", [2.3, 2.4])], "bpe-300, 2.1000. Second is bpe-400"),
        ([made("bpe-300", [2.0, 2.2]), made("bpe-400", [2.3, 2.4])], "each of its seeds is below each of"),
        (
            [made("bpe-300", [2.0, 2.3]), made("bpe-400", [2.2, 2.4])],
            "its seeds overlap those of the second's",
        ),
        ([made("bpe-300", [2.0]), made("bpe-400", [2.2])], "one seed, so nothing says how much"),
        (
            [made("wordpiece-300", [1.0], False), made("bpe-400", [2.0])],
            "Fewest bits per byte: bpe-400, 2.0000.",
        ),
        ([made("wordpiece-300", [1.0], False)], "cannot be compared"),
    ],
)
def test_the_finding(tokenizers: list[dict[str, Any]], words: str) -> None:
    assert words in finding(made_results(*tokenizers))


def test_the_plots_have_a_line_for_each_algorithm() -> None:
    drawn = lines([made("bpe-400", [2.0, 2.5]), made("bpe-300", [3.0]), made("unigram-300", [1.0], False)])
    first, second = drawn["bits"]
    assert (first.name, first.x, first.y) == ("bpe", [[300, 400]], [3.0, 2.25])
    assert (first.low, first.high) == ([3.0, 2.0], [3.0, 2.5])
    assert (second.name, second.dash, first.dash) == ("unigram (loses text)", "dot", "solid")
    assert first.color != second.color
    assert drawn["bytes"][0].y == [made("bpe", [0.0])["bytes_per_token"]] * 2 and not drawn["bytes"][0].low


def test_the_page_escapes_names_and_shows_what_is_equal() -> None:
    text = page(made_results(made("bpe-300", [2.0, 2.2]), made("wordpiece-300", [1.0, 1.1], False)))
    shown = text.split("<script>")[0]
    assert "Tokenizers on &lt;b&gt;" in shown
    assert "<th>&lt;script&gt;</th><td>99.5%</td><td><b>2.500</b></td><td>3.500</td>" in shown
    assert "1 with less than 1% of the held-out text" in shown and "trace" not in shown
    assert "2 steps of 4 sequences, each of about 48 bytes of text" in shown
    assert '1.0500*<br><span class="range">1.0000 to 1.1000</span>' in shown
    assert "&gt;99.99%" in shown and "2 seeds" in shown
    assert "https://" not in shown and "plotly" in text


def test_the_table_marks_what_does_not_compare() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(made_results(made("bpe-300", [2.0, 2.2]), made("wordpiece-300", [1.0, 1.1], False))))
    text = console.export_text()
    assert "2.100 ± 0.100" in text and "1.050* ± 0.050" in text


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("sizes=[100]", "tokenizer.vocabulary_size: 100 is below 257; choose more"),
        ("sizes=[300,300]", "sizes: [300, 300] is empty or names one twice; name each once"),
        ("algorithms=[]", "algorithms: [] is empty or names one twice; name each once"),
        (
            "algorithms=[bpf]",
            "algorithms: bpf is none of bpe, bytes, characters, existing, unigram, wordpiece",
        ),
        ("steps=0", "steps: 0 is not positive; give a larger number"),
        (
            "objective=masked",
            "objective: does not predict the text, so it has no bits per byte; choose causal",
        ),
        ("seeds=few", "seeds: Value 'few' of type 'str' could not be converted to Integer"),
        (
            "data=text",
            "data.source.paths: must be set, for example data.source.paths=... on the command line",
        ),
    ],
)
def test_a_wrong_key_is_one_line(given: str, line: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("tokenizers", overrides=[given])
    with pytest.raises(ValueError) as caught:
        study(node, Console(quiet=True))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("tokenizer=unigram", "algorithms and sizes"),
        ("tokenizer.vocabulary_size=300", "algorithms and sizes"),
        ("horizon.steps=3", "steps"),
        ("sequence_length=3", "context_bytes"),
        ("seed=3", "seeds"),
    ],
)
def test_keys_that_the_study_sets_are_refused(given: str, instead: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{given.split('=')[0]}: is set by the study .*; set {instead} instead"
    ):
        refuse(["data=text", given], OWN)


def test_the_command_says_what_is_wrong_in_one_line() -> None:
    done = command("seed=3")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: seed: is set by the study for each of its runs; set seeds instead\n"


def test_every_key_of_the_study_has_a_default() -> None:
    node = OmegaConf.load(ROOT / "conf" / "tokenizers.yaml")
    assert all(node[field.name] for field in dataclasses.fields(Study))
