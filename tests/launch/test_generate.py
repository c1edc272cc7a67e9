"""launch.generate: what is streamed is what the model says, and mistakes end in one line."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer

from data.tokenizer import BPE, END_OF_TEXT, Bytes, Characters, WordPiece, load_tokenizer, save_tokenizer
from launch import generate as command
from launch.generate import Request, from_hydra, load_model, quoted, stream
from launch.request import CONF
from model.gpt import GPT
from tests.tiny import write_checkpoint
from train.config import Horizon, RunConfig, to_container
from train.eval.sample import decoded
from train.rundir import RunDir

TEXT = "the naïve café: 🙂🙃 the quick brown fox's \t jumps — 日本語\n" * 3
MODEL: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "sequence_length": 64}
DEFAULTS: dict[str, Any] = {
    "prompt": "the ",
    "max_new_tokens": 24,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "seed": 0,
    "checkpoint": "latest",
}


def request(run: Path, **changes: Any) -> Request:
    return Request(run=str(run), **(DEFAULTS | changes))


def make_run(path: Path, tokenizer: Tokenizer, checkpoints: Iterable[int]) -> Path:
    """A run's directory with random models as checkpoints."""
    rundir = RunDir(path)
    path.mkdir()
    save_tokenizer(tokenizer, rundir.tokenizer)
    node = {"_target_": "model.gpt.GPT", "vocabulary_size": None, **MODEL}
    slot = {"_target_": "unused"}
    config = RunConfig(
        horizon=Horizon(steps=1), model=node, objective=slot, optim=slot, schedule=slot, tokenizer=slot
    )
    rundir.config.write_text(yaml.safe_dump(to_container(config)))
    for step in checkpoints:
        torch.manual_seed(step)
        model = GPT(vocabulary_size=tokenizer.get_vocab_size(), **MODEL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)  # far enough from uniform that the model has favourites
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        write_checkpoint(rundir.checkpoints, step, weights)
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "bytes", Bytes().train([]), (3, 20))


def argmax_loop(model: GPT, tokens: list[int], steps: int, end: int) -> list[int]:
    """Greedy decoding without a cache."""
    model.eval()
    tokens = list(tokens)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens], device=model.embedding.weight.device))[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("prompt", ["the ", "🙂"])
def test_greedy_text_is_that_of_an_argmax_loop(run: Path, prompt: str) -> None:
    model, tokenizer = load_model(run)
    tokens = argmax_loop(model, tokenizer.encode(prompt).ids, 24, tokenizer.token_to_id(END_OF_TEXT) or 0)
    text = tokenizer.decode(tokens)
    assert len(text) > len(prompt)
    assert prompt + "".join(stream(request(run, prompt=prompt))) == text


def test_an_empty_prompt_starts_from_end_of_text(run: Path) -> None:
    model, tokenizer = load_model(run)
    end = tokenizer.token_to_id(END_OF_TEXT) or 0
    expected = tokenizer.decode(argmax_loop(model, [end], 24, end))
    assert "".join(stream(request(run, prompt=""))) == expected != ""


def test_a_seed_gives_one_text_and_another_seed_another(run: Path) -> None:
    def sampled(seed: int) -> str:
        return "".join(stream(request(run, temperature=1.0, seed=seed)))

    assert sampled(1) == sampled(1) != sampled(2)


def test_the_checkpoint_is_the_newest_or_the_one_asked_for(run: Path) -> None:
    latest, newest, older = (
        "".join(stream(request(run, checkpoint=checkpoint))) for checkpoint in ("latest", 20, 3)
    )
    assert latest == newest != older


@pytest.mark.parametrize(
    "tokenizer",
    [
        Bytes().train([]),
        BPE(300).train([TEXT]),
        Characters().train([TEXT]),
        WordPiece(200, lowercase=False).train([TEXT]),
    ],
    ids=["bytes", "bpe", "characters", "wordpiece"],
)
def test_pieces_join_to_what_the_whole_decodes_to(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT).ids
    for start in (0, 1):
        prompt = tokens[:start]
        pieces = list(decoded(tokenizer, prompt, tokens[start:]))
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(tokens)
        assert not any("�" in piece for piece in pieces)
        assert len(pieces) > 20  # a stream, not one text at the end


def test_a_character_of_several_tokens_appears_whole_and_at_once() -> None:
    tokenizer = Bytes().train([])
    assert list(decoded(tokenizer, [], tokenizer.encode("a🙂é").ids)) == ["a", "🙂", "é"]


def test_bytes_that_are_no_character_are_shown_broken() -> None:
    tokenizer = Bytes().train([])
    smile, letter = tokenizer.encode("🙂").ids, tokenizer.encode("a").ids
    tokens = [*smile[:2], *letter, smile[3], smile[3], *letter, *smile[:3]]
    assert "".join(decoded(tokenizer, [], tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a, b",
        "it's",
        "'quoted'",
        "back\\",
        "\\'",
        "${x}",
        "\\${x}",
        "[{(",
        "null",
        "12",
        "a=b\n",
        "é🙂",
        "  ",
    ],
)
def test_a_prompt_reaches_the_command_as_it_stands(text: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("generate", [quoted("run=somewhere"), quoted(f"prompt={text}")])
    assert from_hydra(node).prompt == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=nowhere", "nowhere/config.yaml: no such file"),
        ("max_new_tokens=many", "max_new_tokens: "),
        ("max_new_tokens=0", "max_new_tokens: 0 is not"),
        ("temperature=-1", "temperature: "),
        ("temperature=nan", "temperature: "),
        ("top_k=0", "top_k: "),
        ("top_p=1.5", "top_p: "),
        ("seed=-1", "seed: "),
        ("checkpoint=4", "no checkpoint of step 4; there are 3, 20"),
        ("checkpoint=best", "checkpoint: best"),
    ],
)
def test_mistakes_name_the_key(run: Path, override: str, message: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("generate", [f"run={run}", override])
    with pytest.raises(ValueError, match=message) as error:
        stream(from_hydra(node))
    assert "\n" not in str(error.value)


def test_a_run_without_a_checkpoint_or_tokenizer_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", Bytes().train([]), ())
    with pytest.raises(ValueError, match="checkpoints: no checkpoint; there is none"):
        stream(request(run))
    (run / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        stream(request(run))


def test_the_command_prints_prompt_and_text(run: Path) -> None:
    prompt = "it's, \n🙂"
    arguments = [f"run={run}", f"prompt={prompt}", "temperature=0", "top_k=null", "max_new_tokens=8"]
    root = Path(command.__file__).parent.parent
    line = [sys.executable, "-m", "launch.generate", *arguments]
    done = subprocess.run(line, capture_output=True, cwd=root, timeout=120)
    expected = prompt + "".join(stream(request(run, prompt=prompt, max_new_tokens=8))) + "\n"
    assert (done.returncode, done.stdout.decode()) == (0, expected)


def test_the_command_without_a_run_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["generate", "prompt=a"])
    with pytest.raises(SystemExit) as exit:
        command.main()
    said = capsys.readouterr()
    assert exit.value.code == 1 and not said.out
    assert said.err.startswith("error: run: must be set") and said.err.count("\n") == 1


def test_the_tokenizer_of_the_run_is_the_one_that_encodes(run: Path) -> None:
    text = f"a{END_OF_TEXT}"  # the literal in a prompt is text, not the special token
    assert len(load_tokenizer(run / "tokenizer").encode(text).ids) == len(text)
    assert "".join(stream(request(run, prompt=text))) != "".join(stream(request(run, prompt="a")))
