from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from data.tokenizer import (
    BPE,
    END_OF_TEXT,
    UNKNOWN,
    Bytes,
    Characters,
    Existing,
    TokenizerRecipe,
    Unigram,
    WordPiece,
    capped,
    load_tokenizer,
    save_tokenizer,
)

NASTY = [
    "  two leading spaces, one trailing ",
    "tabs\t\t, CRLF\r\n\r\n, CR\r, form feed \x0c, runs      of spaces\n\n\n\n",
    "control \x00\x01\x1b\x7f, \u2028 separators, no-break\u00a0space, zero\u200bwidth, BOM \ufeff",
    "emoji 😀👩‍👩‍👧‍👦, é as e\u0301, ß, 漢字, \u202eright to left עברית",
    f"the literal {END_OF_TEXT} and {END_OF_TEXT}{END_OF_TEXT}, {UNKNOWN}, <|endoftext",
    END_OF_TEXT,
    "I'll, don't ; 3.14159e-10 == __init__(self, *args, **kwargs) -> None: # ▁ Ġ Ċ ##ing <0x41>",
    "\n",
    " ",
]
PROSE = ["the quick brown fox jumps over the lazy dog. " * 20, "def f(x):\n    return x + 1\n" * 20]
RECIPES: list[TokenizerRecipe] = [BPE(400), Unigram(400), WordPiece(300), Characters(), Bytes()]
LOSSLESS = [recipe for recipe in RECIPES if recipe.lossless]


def name(recipe: TokenizerRecipe) -> str:
    return type(recipe).__name__


def saved(recipe: TokenizerRecipe, texts: list[str], folder: Path) -> Tokenizer:
    save_tokenizer(recipe.train(iter(texts)), folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("recipe", LOSSLESS, ids=name)
def test_a_lossless_tokenizer_gives_any_text_back(recipe: TokenizerRecipe, tmp_path: Path) -> None:
    seen = NASTY if isinstance(recipe, Characters) else []  # the others have never seen these texts
    tokenizer = saved(recipe, PROSE + seen, tmp_path / "t")
    for text in NASTY + PROSE:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(ids) == text  # nothing in there is a special token


def test_only_wordpiece_loses() -> None:
    assert [name(recipe) for recipe in RECIPES if not recipe.lossless] == ["WordPiece"]


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_special_token_in_a_text_is_text(recipe: TokenizerRecipe, tmp_path: Path) -> None:
    tokenizer = saved(recipe, PROSE + NASTY, tmp_path / "t")
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end == 0
    for encoding in tokenizer.encode_batch_fast(NASTY, add_special_tokens=False):
        assert end not in encoding.ids


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_auto_tokenizer_gives_the_same(recipe: TokenizerRecipe, tmp_path: Path) -> None:
    tokenizer = saved(recipe, PROSE + NASTY, tmp_path / "t")
    auto = AutoTokenizer.from_pretrained(tmp_path / "t")
    for text in PROSE + NASTY:
        if END_OF_TEXT in text or UNKNOWN in text:
            continue  # there it reads the special token, as users of transformers expect
        ids = tokenizer.encode(text).ids
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == tokenizer.decode(ids)
    assert len(auto) == tokenizer.get_vocab_size()
    assert auto.eos_token == auto.bos_token == END_OF_TEXT and auto.eos_token_id == 0
    assert auto(f"fox{END_OF_TEXT}")["input_ids"][-1] == 0


@pytest.mark.parametrize("recipe", [BPE(300), Unigram(300), WordPiece(60)], ids=name)
def test_the_vocabulary_is_as_large_as_asked(recipe: TokenizerRecipe, tmp_path: Path) -> None:
    texts = [" ".join(f"word{i * 7919 % 1000}suffix" for i in range(2000))]
    size = saved(recipe, texts, tmp_path / "t").get_vocab_size()
    assert 0.9 * recipe.vocabulary_size <= size <= recipe.vocabulary_size  # type: ignore[attr-defined]


def test_bpe_learns_what_is_frequent(tmp_path: Path) -> None:
    tokenizer = saved(BPE(400), PROSE, tmp_path / "t")
    assert tokenizer.encode(" quick brown").tokens == ["Ġquick", "Ġbrown"]


def test_characters_and_bytes_are_one_token_each(tmp_path: Path) -> None:
    characters = saved(Characters(), ["abé\n"], tmp_path / "c")
    assert characters.get_vocab_size() == 2 + 4
    assert len(characters.encode("aébé\n\n").ids) == 6
    assert characters.encode("axxb").tokens == ["a", UNKNOWN, UNKNOWN, "b"]
    raw = saved(Bytes(), [], tmp_path / "b")
    assert raw.get_vocab_size() == 257
    assert len(raw.encode("é😀\n").ids) == len("é😀\n".encode())


def test_an_existing_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
    made_elsewhere = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    made_elsewhere.enable_truncation(2)
    made_elsewhere.save(str(tmp_path / "tokenizer.json"))
    tokenizer = saved(Existing(str(tmp_path / "tokenizer.json")), [], tmp_path / "t")
    assert tokenizer.encode("abba").ids == [0, 1, 1, 0]
    assert tokenizer.token_to_id(END_OF_TEXT) == 3
    with pytest.raises(ValueError, match=r"^tokenizer.path: .*none.json is not a file"):
        Existing(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^tokenizer.path: .*bad.json is no tokenizer.json"):
        Existing(str(tmp_path / "bad.json")).train([])


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer.vocabulary_size: 256 is below 257"):
        BPE(256)
    with pytest.raises(ValueError, match=r"^tokenizer.training_bytes: 0"):
        Characters(training_bytes=0)


def test_training_stops_reading_at_its_share_of_the_text() -> None:
    texts = iter(["é" * 5, "b" * 10, "c"])
    assert list(capped(texts, 20)) == ["é" * 5, "b" * 10]
    assert list(texts) == ["c"]
