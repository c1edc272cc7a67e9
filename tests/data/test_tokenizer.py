from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from data.tokenizer import (
    BPE,
    END_OF_TEXT,
    MASK,
    SPECIAL,
    UNKNOWN,
    Bytes,
    Characters,
    Existing,
    TokenizerRecipe,
    Unigram,
    WordPiece,
    all_special_ids,
    capped,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    vocabulary_size,
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
SETS = list(SPECIAL)
WITH_SPECIAL: list[TokenizerRecipe] = [
    BPE(500, special=SETS),
    Unigram(500, special=SETS),
    WordPiece(400, special=SETS),
    Characters(special=SETS),
    Bytes(special=SETS),
]
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
    with pytest.raises(ValueError, match=r"^tokenizer.vocabulary_size: 256 is below 261"):
        BPE(256, special=["masking"])
    with pytest.raises(ValueError, match=r"^tokenizer.vocabulary_size: 100 is below 103"):
        WordPiece(100, special=["sentinels"])
    with pytest.raises(ValueError, match=r"^tokenizer.special: no set masks; there are masking, sentinels, "):
        Bytes(special=["masking", "masks"])
    with pytest.raises(ValueError, match=r"^tokenizer.training_bytes: 0"):
        Characters(training_bytes=0)


def test_training_stops_reading_at_its_share_of_the_text() -> None:
    texts = iter(["é" * 5, "b" * 10, "c"])
    assert list(capped(texts, 20)) == ["é" * 5, "b" * 10]
    assert list(texts) == ["c"]


@pytest.mark.parametrize("recipe", WITH_SPECIAL, ids=name)
def test_special_tokens_come_after_the_first_and_no_text_holds_them(
    recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    tokenizer = saved(recipe, PROSE, tmp_path / "t")
    special = all_special_ids(tokenizer)
    assert special == list(range(len(special)))
    asked_for = [i for name in SETS for i in special_ids(tokenizer, name)]
    assert asked_for == special[-110:] and len(special) - len(asked_for) <= 2
    assert special_ids(tokenizer, "masking")[-1] == tokenizer.token_to_id(MASK)
    literal = " ".join(token for name in SETS for token in SPECIAL[name])
    assert not set(special) - {tokenizer.token_to_id(UNKNOWN)} & set(tokenizer.encode(literal).ids)
    assert vocabulary_size(tokenizer) <= getattr(recipe, "vocabulary_size", 110 + 2 + 256)


@pytest.mark.parametrize("recipe", WITH_SPECIAL, ids=name)
def test_auto_tokenizer_knows_the_special_tokens(recipe: TokenizerRecipe, tmp_path: Path) -> None:
    tokenizer = saved(recipe, PROSE, tmp_path / "t")
    auto = AutoTokenizer.from_pretrained(tmp_path / "t")
    named = [auto.pad_token_id, auto.cls_token_id, auto.sep_token_id, auto.mask_token_id]
    assert named == special_ids(tokenizer, "masking")
    assert sorted(auto.all_special_ids) == all_special_ids(tokenizer)
    assert auto.unk_token_id == tokenizer.token_to_id(UNKNOWN)
    assert len(auto) == vocabulary_size(tokenizer)
    assert auto.convert_tokens_to_ids("<extra_id_7>") == special_ids(tokenizer, "sentinels")[7]
    spelled = "fox[MASK]fox<extra_id_99>"
    assert [i for i in auto(spelled)["input_ids"] if i in auto.all_special_ids] == [
        auto.mask_token_id,
        special_ids(tokenizer, "sentinels")[99],
    ]


def test_a_missing_set_is_named() -> None:
    for recipe in RECIPES:
        tokenizer = recipe.train(iter(PROSE))
        with pytest.raises(ValueError, match=r"^tokenizer.special: .* no \[PAD\].*add masking to"):
            special_ids(tokenizer, "masking")
    only = Bytes(special=["infilling"]).train([])
    assert special_ids(only, "infilling") == [1, 2, 3]
    with pytest.raises(ValueError, match=r"add sentinels to tokenizer.special$"):
        special_ids(only, "sentinels")


def test_an_existing_tokenizer_keeps_its_own_special_tokens_and_gets_the_missing(tmp_path: Path) -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "fox": 4}
    made_elsewhere = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    made_elsewhere.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    path = tmp_path / "tokenizer.json"
    made_elsewhere.save(str(path))
    tokenizer = saved(Existing(str(path), special=["masking"]), [], tmp_path / "t")
    assert special_ids(tokenizer, "masking") == [0, 2, 3, 6]
    assert tokenizer.token_to_id(END_OF_TEXT) == 5 and vocabulary_size(tokenizer) == 7
    auto = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert [auto.pad_token_id, auto.unk_token_id, auto.mask_token_id] == [0, 1, 6]


def test_wordpiece_splits_cjk_characters_and_may_keep_case_and_accents(tmp_path: Path) -> None:
    text = "我爱北京 Café été"
    folded = saved(WordPiece(100), [text] * 3, tmp_path / "folded")
    assert folded.encode("北京我 café").tokens == ["北", "京", "我", "cafe"]
    kept = saved(WordPiece(100, lowercase=False), [text] * 3, tmp_path / "kept")
    assert kept.encode("北京我 Café été").tokens == ["北", "京", "我", "Café", "été"]
    assert kept.encode("cafe").tokens != kept.encode("Café").tokens
