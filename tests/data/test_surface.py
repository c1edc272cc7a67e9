"""What tokens spell and which make up words, for every kind of tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.surface import PLACEHOLDER, REPLACEMENT, Surface
from data.tokenizer import BPE, END_OF_TEXT, Bytes, Characters, Existing, TokenizerRecipe, Unigram, WordPiece

TEXT = (
    "The quick brown foxes don't jump_over 3.14 lazy dogs.\n\n    return x+1  # naïve café\tend "
    "北京大学 in Beijing, 我爱 東京タワー!? 😀👍🏽 привет"
)
LOSSLESS: list[TokenizerRecipe] = [BPE(400), Unigram(400), Characters(), Bytes()]


def made(recipe: TokenizerRecipe, *texts: str) -> Tokenizer:
    tokenizer = recipe.train(iter(texts or (TEXT,)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)


def spelt_words(tokenizer: Tokenizer, tokens: np.ndarray, **options: object) -> list[str]:
    """The text of each word; special tokens left out."""
    surface = Surface(tokenizer, **options)  # type: ignore[arg-type]
    words = surface.words(tokens)
    text, owner = surface.spell(tokens)
    numbers = sorted(set(words.tolist()) - {-1})
    return ["".join(c for c, o in zip(text, owner, strict=True) if words[o] == word) for word in numbers]


@pytest.mark.parametrize("recipe", LOSSLESS, ids=lambda recipe: type(recipe).__name__)
def test_what_lossless_tokens_spell_is_the_text(recipe: TokenizerRecipe) -> None:
    tokenizer = made(recipe)
    tokens = ids(tokenizer, TEXT)
    text, owner = Surface(tokenizer).spell(tokens)
    assert text == TEXT and owner.dtype == np.int64 and len(owner) == len(text)
    ends = [tokenizer.decode(tokens[: i + 1].tolist()).rstrip(REPLACEMENT) for i in range(len(tokens))]
    for place, token in enumerate(owner):  # complete or begun by its owner, and not there before
        assert len(ends[token - 1] if token else "") <= place
        whole = next(i for i, end in enumerate(ends) if len(end) > place)
        assert token <= whole <= token + 3  # at most four bytes


def test_a_character_is_of_the_token_with_its_first_byte() -> None:
    tokenizer = made(Bytes())
    text, owner = Surface(tokenizer).spell(ids(tokenizer, "aé😀b"))
    assert text == "aé😀b" and owner.tolist() == [0, 1, 3, 7]


def test_wordpiece_is_spelt_with_spaces_but_between_cjk_characters() -> None:
    tokenizer = made(WordPiece(60), "new yorker s yorkers " * 9 + "北 京 ' s ,")
    tokens = ids(tokenizer, "New Yorkers' 北京, yo")
    surface = Surface(tokenizer)
    text, owner = surface.spell(tokens)
    assert text == "new yorkers ' 北京 , yo"
    pieces = tokenizer.encode("New Yorkers' 北京, yo").tokens
    for i, piece in enumerate(pieces):
        own = "".join(c for c, o in zip(text, owner, strict=True) if o == i)
        assert own.strip() == piece.removeprefix("##")
        assert own.startswith(" ") == (i > 0 and not piece.startswith("##") and piece != "京")
    assert spelt_words(tokenizer, tokens) == ["new", " yorkers", " '", " 北", "京", " ,", " yo"]


def test_special_tokens_are_placeholders_and_cut_characters_replacements() -> None:
    tokenizer = made(Bytes())
    end = tokenizer.token_to_id(END_OF_TEXT)
    e = ids(tokenizer, "é")
    tokens = np.array([*e[1:], end, *ids(tokenizer, "ab"), end, end, e[0]])
    surface = Surface(tokenizer)
    text, owner = surface.spell(tokens)
    assert text == f"{REPLACEMENT}{PLACEHOLDER}ab{PLACEHOLDER * 2}{REPLACEMENT}"
    assert owner.tolist() == list(range(7))
    words = surface.words(tokens)
    assert words[[1, 4, 5]].tolist() == [-1, -1, -1]
    assert words[2] == words[3] and len(set(words[[0, 2, 6]].tolist())) == 3
    assert surface.words(tokens[:0]).shape == (0,) and surface.spell(tokens[:0])[0] == ""


def test_words_are_runs_of_letters_or_one_sign_with_the_space_before() -> None:
    tokenizer = made(Characters())
    expected = [
        m.group() for m in re.finditer(r"\s*(?:[北京大学我爱東]|[^\W北京大学我爱東]+|[^\w\s])|\s+$", TEXT)
    ]
    expected = [word for word in expected if word != "🏽"]
    found = spelt_words(tokenizer, ids(tokenizer, TEXT))
    assert [word for word in found if word != "🏽"] == expected
    assert "タワー" in found and " jump_over" in found and "\n\n    return" in found


def test_marks_belong_to_the_letter_they_stand_on() -> None:
    text = "re\u0301sume\u0301 हिन्दी है 👩\u200d👧"
    tokenizer = made(Characters(), text)
    assert spelt_words(tokenizer, ids(tokenizer, text))[:3] == ["re\u0301sume\u0301", " हिन्दी", " है"]


@pytest.mark.parametrize("recipe", [*LOSSLESS, WordPiece(300)], ids=lambda recipe: type(recipe).__name__)
def test_tokens_of_a_word_stand_together_and_their_text_begins_one(recipe: TokenizerRecipe) -> None:
    tokenizer = made(recipe)
    tokens = ids(tokenizer, TEXT)
    words = Surface(tokenizer).words(tokens)
    assert (np.diff(words) >= 0).all() and words[0] == 0
    spelt = spelt_words(tokenizer, tokens)
    assert "".join(spelt) == Surface(tokenizer).spell(tokens)[0]
    for left, right in zip(spelt, spelt[1:], strict=False):
        assert not re.search(r"\w$", left) or not re.match(r"[a-z0-9_]", right)


def test_tokenizers_made_elsewhere_spell_what_their_decoders_say(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁new": 1, "▁york": 2, "er": 3, "<0xC3>": 4, "<0xA9>": 5, "▁": 6}
    sentencepiece = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    llama = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    t5 = decoders.Metaspace()
    clip = Tokenizer(models.BPE(vocab={"new</w>": 0, "york": 1, "er</w>": 2}, merges=[]))
    clip.decoder = decoders.BPEDecoder(suffix="</w>")
    bare = Tokenizer(models.WordLevel({"new": 0, "york": 1}, unk_token="new"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    cases = []
    for decoder in (decoders.Sequence(llama), t5):
        sentencepiece.decoder = decoder
        cases.append((sentencepiece.to_str(), [1, 2, 3], " new yorker", [" new", " yorker"]))
    cases[0] = (cases[0][0], [1, 2, 3, 4, 5], " new yorkeré", [" new", " yorkeré"])
    cases.append((clip.to_str(), [0, 1, 2], "new yorker ", ["new ", "yorker "]))
    cases.append((bare.to_str(), [0, 1], "new york", ["new", " york"]))
    for i, (file, tokens, text, words) in enumerate(cases):
        path = tmp_path / f"{i}.json"
        path.write_text(file)
        tokenizer = Existing(str(path)).train([])
        assert Surface(tokenizer).spell(np.array(tokens))[0] == text
        assert spelt_words(tokenizer, np.array(tokens)) == words
