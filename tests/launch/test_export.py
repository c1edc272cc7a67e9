"""launch.export: what transformers loads from the directory says what the run's model says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from data.tokenizer import (
    BPE,
    CLS,
    END_OF_TEXT,
    MASK,
    PAD,
    SEP,
    UNKNOWN,
    Bytes,
    Special,
    WordPiece,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    vocabulary_size,
)
from launch import export as command
from launch.export import Request, export, from_hydra
from launch.request import CONF
from model.denoise import generate_from
from model.generate import generate
from tests.model.hf_cases import TARGETS, spread
from tests.tiny import write_checkpoint
from train.config import Horizon, RunConfig, to_container
from train.pretrained import check_pretrained, load_pretrained
from train.rundir import RunDir

TEXT = "the quick brown fox jumps over the lazy dog, and the naïve café: 🙂\n" * 3
SIZES: dict[str, Any] = {"layers": 2, "width": 48, "heads": 4, "sequence_length": 64}
ROTARY = {"position": "rotary", "tied": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"_target_": "model.gpt.GPT", **SIZES},
    "demo": {"_target_": "model.gpt.GPT", **SIZES, "position": "rotary"},
    "llama": {"_target_": "model.gpt.GPT", **SIZES, **ROTARY, "norm": "rmsnorm", "activation": "swiglu"},
    "bert": {"_target_": "model.bert.BERT", **SIZES},
    "bert-pairs": {"_target_": "model.bert.BERT", **SIZES, "pair_head": True},
    "t5": {"_target_": "model.t5.T5", **SIZES, "head_width": 8},
    "t5-untied": {"_target_": "model.t5.T5", **SIZES, "activation": "geglu_tanh", "tied": False},
}
TOKENS: dict[str, Special] = {"bert": ("masking",), "t5": ("masking", "sentinels")}


def make_run(
    path: Path, name: str, tokenizer: Tokenizer | None = None, steps: tuple[int, ...] = (3, 20)
) -> Path:
    """A run's directory with random models as checkpoints."""
    rundir, node = RunDir(path), MODELS[name]
    if tokenizer is None:
        tokenizer = BPE(500, special=TOKENS.get(name.split("-")[0], ())).train([TEXT])
    path.mkdir()
    save_tokenizer(tokenizer, rundir.tokenizer)
    slot = {"_target_": "unused"}
    config = RunConfig(
        horizon=Horizon(steps=1), model=node, objective=slot, optim=slot, schedule=slot, tokenizer=slot
    )
    rundir.config.write_text(yaml.safe_dump(to_container(config)))
    for step in steps:
        torch.manual_seed(step)
        weights = {key: parameter.detach() for key, parameter in model_of(path).named_parameters()}
        write_checkpoint(rundir.checkpoints, step, weights)
    return path


def model_of(run: Path) -> Any:
    """The run's model with weights from torch's random state."""
    node = yaml.safe_load((run / "config.yaml").read_text())["model"]
    options = {key: value for key, value in node.items() if key != "_target_"}
    size = vocabulary_size(load_tokenizer(run / "tokenizer"))
    return spread(TARGETS[node["_target_"]](vocabulary_size=size, **options))


def request(run: Path, **changes: Any) -> Request:
    defaults: dict[str, Any] = {"format": "hf", "directory": None, "checkpoint": "latest"}
    return Request(run=str(run), **(defaults | changes))


def exported(run: Path, **changes: Any) -> tuple[Path, Any]:
    """The directory, and the model of the checkpoint it is made of."""
    directory, step = export(request(run, **changes))
    torch.manual_seed(step)
    return directory, model_of(run)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(auto: Any, directory: Path) -> Any:
    model, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.mark.parametrize("name", ["gpt2", "demo", "llama"])
@pytest.mark.parametrize("checkpoint", ["latest", 3])
def test_greedy_text_of_a_decoder_is_the_same_there(name: str, checkpoint: int | str, tmp_path: Path) -> None:
    directory, ours = exported(make_run(tmp_path / "run", name), checkpoint=checkpoint)
    theirs, tokenizer = loaded(AutoModelForCausalLM, directory), AutoTokenizer.from_pretrained(directory)
    prompt = load_tokenizer(tmp_path / "run" / "tokenizer").encode("the quick ").ids
    batch = tokenizer("the quick ", return_tensors="pt")
    assert batch["input_ids"][0].tolist() == prompt
    end = tokenizer.eos_token_id
    expected = list(generate(ours, prompt, max_new_tokens=40, temperature=0, end_of_text=end))
    text = theirs.generate(**batch, max_new_tokens=40, do_sample=False)[0].tolist()
    assert len(expected) > 5
    assert text[len(prompt) :] == expected + ([] if len(expected) == 40 else [end])


def test_generation_ends_there_where_it_ends_here(tmp_path: Path) -> None:
    """The likeliest token is made the one that ends a text."""
    directory, ours = exported(make_run(tmp_path / "run", "demo"))
    tokens = list(generate(ours, [5, 6, 7], max_new_tokens=9, temperature=0))
    config = json.loads((directory / "generation_config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == 0
    path = directory / "generation_config.json"
    path.write_text(json.dumps(config | {"eos_token_id": tokens[4]}))
    theirs = loaded(AutoModelForCausalLM, directory)
    text = theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)[0].tolist()
    stopped = tokens[: tokens.index(tokens[4])]
    assert stopped == list(generate(ours, [5, 6, 7], max_new_tokens=9, temperature=0, end_of_text=tokens[4]))
    assert text == [5, 6, 7, *stopped, tokens[4]]


@pytest.mark.parametrize("name", ["t5", "t5-untied"])
def test_greedy_text_of_an_encoder_decoder_is_the_same_there(name: str, tmp_path: Path) -> None:
    directory, ours = exported(make_run(tmp_path / "run", name))
    theirs, tokenizer = loaded(AutoModelForSeq2SeqLM, directory), AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(["the <extra_id_0> fox", "the quick brown fox <extra_id_1>"], padding=True)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    texts = theirs.generate(**batch.convert_to_tensors("pt"), max_new_tokens=30, do_sample=False).tolist()
    for row, text in zip(batch["input_ids"].tolist(), texts, strict=True):
        inputs = [token for token in row if token != pad]
        assert inputs[-1] == end
        expected = list(generate_from(ours, inputs, start=pad, max_new_tokens=30, temperature=0, end=end))
        assert len(expected) > 5
        assert text[0] == pad and text[1 : 1 + len(expected)] == expected
        assert text[1 + len(expected) :] in ([], [end] + [pad] * (29 - len(expected)))


@pytest.mark.parametrize("name", ["bert", "bert-pairs"])
def test_masks_are_filled_as_there(name: str, tmp_path: Path) -> None:
    directory, ours = exported(make_run(tmp_path / "run", name))
    theirs, report = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all("pooler" in key or "seq_relationship" in key for key in report["unexpected_keys"])
    assert bool(report["unexpected_keys"]) == (name == "bert-pairs")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(["the quick [MASK] fox", "the [MASK] dog and the [MASK]"], padding=True)
    batch = batch.convert_to_tensors("pt")
    _, first, last, mask = special_ids(load_tokenizer(directory), "masking")
    assert (batch["input_ids"][:, 0] == first).all() and batch["input_ids"][1, -1] == last
    masked, documents = batch["input_ids"] == mask, batch["attention_mask"].int() - 1
    with torch.no_grad():
        logits = theirs(**batch).logits
        expected = ours(batch["input_ids"], documents_BT=documents)
    assert masked.sum() == 3
    assert torch.equal(logits[masked].argmax(-1), expected[masked].argmax(-1))
    torch.testing.assert_close(logits[masked], expected[masked], atol=1e-4, rtol=1e-5)


def test_pairs_are_framed_with_their_segments(tmp_path: Path) -> None:
    directory, _ = exported(make_run(tmp_path / "run", "bert"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer("the fox", "the dog")
    names = tokenizer.convert_ids_to_tokens(batch["input_ids"])
    second = names.index(SEP) + 1
    assert names[0] == CLS and names[-1] == SEP and names.count(SEP) == 2
    assert batch["token_type_ids"] == [0] * second + [1] * (len(names) - second)


@pytest.mark.parametrize(
    "tokenizer",
    [
        Bytes().train([]),
        Bytes(special=["masking", "sentinels", "infilling"]).train([]),
        BPE(500, special=["masking"]).train([TEXT]),
        WordPiece(300, special=["masking"]).train([TEXT]),
    ],
    ids=["bytes", "special", "bpe", "wordpiece"],
)
def test_the_tokenizer_s_special_tokens_are_the_same_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory, _ = exported(make_run(tmp_path / "run", "demo", tokenizer))
    theirs = AutoTokenizer.from_pretrained(directory)
    roles = {"eos": END_OF_TEXT, "bos": END_OF_TEXT, "pad": PAD, "cls": CLS, "sep": SEP, "mask": MASK}
    for role, token in {**roles, "unk": UNKNOWN}.items():
        id_ = tokenizer.token_to_id(token)
        assert getattr(theirs, f"{role}_token_id") == id_
        assert getattr(theirs, f"{role}_token") == (None if id_ is None else token)
    for token in tokenizer.get_added_tokens_decoder().values():
        assert (
            theirs(f"the {token.content} fox")["input_ids"].count(tokenizer.token_to_id(token.content)) == 1
        )
        assert token.content in theirs.all_special_tokens
    assert theirs("the naïve fox")["input_ids"] == tokenizer.encode("the naïve fox").ids
    assert theirs.model_max_length == 64


@pytest.mark.parametrize("name", MODELS)
def test_a_run_can_start_from_what_was_exported(name: str, tmp_path: Path) -> None:
    directory, ours = exported(make_run(tmp_path / "run", name))
    other = model_of(tmp_path / "run")
    check_pretrained(other, directory)
    load_pretrained(other, directory)
    for (key, parameter), copy in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, copy), key


def test_a_directory_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "gpt2")
    directory, _ = exported(run)
    assert directory == run / "hf"
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert before.keys() == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1
    with pytest.raises(ValueError, match=f"^directory: {directory} exists; remove it, or name another"):
        export(request(run))
    assert before == {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    other = tmp_path / "far" / "away"
    assert export(request(run, directory=str(other))) == (other, 20)
    assert [path.name for path in other.parent.iterdir()] == ["away"]


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", "gpt2")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save_file", full)
    with pytest.raises(ValueError, match=r"^directory: cannot write .* \(No space left on device\)"):
        export(request(run))
    assert not [path for path in run.iterdir() if "hf" in path.name]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "run: must be set"),
        (["run=nowhere"], "nowhere/config.yaml: no such file"),
        (["run={run}", "format=gguf"], "format: gguf is not known; choose one of hf"),
        (["run={run}", "checkpoint=best"], "checkpoint: best is neither a step nor latest"),
        (["run={run}", "checkpoint=4"], "no checkpoint of step 4; there are 3, 20"),
        (["run={run}", "directory={run}"], "directory: .* exists"),
        (["run={odd}"], "model.qk_norm: True has no equal in transformers' GPT2LMHeadModel"),
    ],
)
def test_mistakes_end_in_one_line(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "odd", MODELS["gpt2"] | {"qk_norm": True})
    run, odd = make_run(tmp_path / "run", "gpt2"), make_run(tmp_path / "odd", "odd")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("export", [override.format(run=run, odd=odd) for override in overrides])
    with pytest.raises(ValueError, match=message) as error:
        export(from_hydra(node))
    assert "\n" not in str(error.value)


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "demo")
    root = Path(command.__file__).parent.parent
    line = [sys.executable, "-m", "launch.export", f"run={run}", "format=hf"]
    first, second = (subprocess.run(line, capture_output=True, cwd=root, timeout=120) for _ in range(2))
    assert (first.returncode, first.stdout.decode()) == (0, f"step 20 is in {run}/hf\n")
    assert second.returncode == 1 and not second.stdout
    assert second.stderr.decode().startswith(f"error: directory: {run}/hf exists")
    assert second.stderr.count(b"\n") == 1
