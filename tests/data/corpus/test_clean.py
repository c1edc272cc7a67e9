import pickle
import random
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

from data.corpus.clean import C4, FineWeb, Gopher, Language, MainText, Repair, Repetition, _identifier
from data.corpus.languages import LANGUAGES
from data.corpus.words import Words

ENGLISH = (
    "The quick brown fox jumps over the lazy dog while the farmer watches from his porch. "
    "It was a warm day in early spring, and nobody had expected the visitors to arrive so soon. "
    "They had come a long way to see the old mill, which stands by the river that gives the town its name. "
    "Most of them were tired and hungry, but they would not rest before they had heard its wheel turn. "
    "Later they sat down to a simple meal of bread and cheese with their hosts and talked until dark."
)
CHINESE = (
    "这座小镇坐落在河边，镇上的老磨坊已经有两百多年的历史。每年春天，都有许多游客来到这里参观。\n"
    "他们沿着石板路慢慢走，听当地的老人讲过去的故事。有人说磨坊的水车曾经养活了全镇的人。\n"
    "傍晚的时候，大家坐在一起吃面包和奶酪，一直聊到天黑。第二天早上，他们又继续往前走了。"
)
PAGE = f"""<!DOCTYPE html><html><head><title>The mill</title><script>var a = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<article><h1>The mill</h1><p>{ENGLISH}</p><p>{ENGLISH[::-1].replace("<", "")}</p></article>
<footer>Copyright, all rights reserved, <a href="/terms">terms of use</a></footer></body></html>"""


def run(stage: Any, text: str, **metadata: str) -> tuple[str | None, str]:
    """(reason, text afterwards), by a stage that has been to another process."""
    document = Document(text, "0", metadata=dict(metadata))
    return pickle.loads(pickle.dumps(stage))(document), document.text


def test_main_text_is_without_what_surrounds_it() -> None:
    reason, text = run(MainText(), PAGE)
    assert reason is None
    assert ENGLISH in text
    for other in ("About us", "Copyright", "var a", "<p>"):
        assert other not in text


@pytest.mark.parametrize(
    "text", ["", "plain text", "<html> is how a page begins.", "a < b and b > c", "# <p>\n\n<p>"]
)
def test_what_is_not_html_passes_main_text(text: str) -> None:
    assert run(MainText(), text)[0] is None or text.startswith("<html>")
    assert run(MainText(), "Text: " + text) == (None, "Text: " + text)


@pytest.mark.parametrize(
    "text",
    [
        "<html></html>",
        "<!-- x --><!doctype html><html><body><nav><a href='/'>x</a></nav></body></html>",
        "<html\0>",
    ],
)
def test_a_page_without_main_text_is_dropped(text: str) -> None:
    assert run(MainText(), text)[0] == "no main text"


def test_the_main_text_of_a_page_depends_on_no_other() -> None:
    stage = MainText()
    first = [stage(document) or document.text for document in [Document(PAGE, str(n)) for n in range(5)]]
    assert first == [first[0]] * 5


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("schÃ¶n und grÃ¼n\nja", "schön und grün\nja"),
        ("ä¸\xadæ–‡å\xad—ç¬¦", "中文字符"),
        ("e\u0301t\u00e9", "été"),
        ("one\r\ntwo\rthree\u2028four\x0cfive", "one\ntwo\nthree\nfour\nfive"),
        ("a\0b\x07c\x1b[31mred\x1b[0m\x7f\ufeff\u200b\xad", "abcred"),
        ("a  \t b \n\n\n\n\nc   ", "a b\n\nc"),
        ("    indented  twice\n\tstays", "    indented twice\n\tstays"),
        ("“quotes”, ﬁne, ｆｕｌｌ　ｗｉｄｔｈ，全角！", "“quotes”, ﬁne, ｆｕｌｌ　ｗｉｄｔｈ，全角！"),
        ("&lt;b&gt; is bold", "&lt;b&gt; is bold"),
        ("\U0001f469\u200d\U0001f4bb می\u200cخواهم", "\U0001f469\u200d\U0001f4bb می\u200cخواهم"),
        ("half \ud83d of a pair", "half of a pair"),
        (ENGLISH, ENGLISH),
        (CHINESE, CHINESE),
    ],
)
def test_repair(text: str, repaired: str) -> None:
    assert run(Repair(), text) == (None, repaired)
    assert run(Repair(), repaired) == (None, repaired)


def test_nothing_left_to_repair_is_dropped() -> None:
    assert run(Repair(), " \n\0\n ")[0] == "empty"


@pytest.mark.parametrize(
    ("text", "keep", "reason"),
    [
        (ENGLISH, ["en"], None),
        (ENGLISH, None, None),
        (ENGLISH, ["zh", "de"], "language"),
        (CHINESE, ["en", "zh"], None),
        (CHINESE, ["en"], "language"),
        ("1 2 3 4", None, "language unsure"),
    ],
)
def test_language(text: str, keep: list[str] | None, reason: str | None) -> None:
    assert run(Language(keep), text)[0] == reason


def test_language_is_noted() -> None:
    document = Document(CHINESE, "0")
    Language()(document)
    assert document.metadata["language"] == "zh" and 0.65 < document.metadata["language_score"] <= 1
    long = Document(CHINESE * 100 + ENGLISH * 1000, "0")
    Language()(long)
    assert long.metadata["language"] == "zh"  # what comes first counts


def test_mistakes_are_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^keep: chinese, eng is not known; use ISO 639 codes, as en or zh$"
    ):
        Language(["en", "eng", "chinese"])
    with pytest.raises(ValueError, match=r"^least: 65 is no probability; give a number from 0 to 1$"):
        Language(least=65)
    for rules in (Gopher, Repetition, C4, FineWeb):
        with pytest.raises(
            ValueError, match=r"^language: 'english' is not known; use an ISO 639 code, as en or zh$"
        ):
            rules(language="english")
    with pytest.raises(ValueError, match=r"^min_words: 100 is not between 1 and max_words \(50\)$"):
        Gopher(min_words=100, max_words=50)


def test_the_languages_are_those_of_the_model() -> None:
    assert set(_identifier().labels) == LANGUAGES


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text, None),
        (lambda text: text[:100], "short doc"),
        (lambda text: "ab " * 100, "below avg threshold"),
        (lambda text: "abcdefghijkl " * 100, "above avg threshold"),
        (lambda text: text + " #" * 30, "too many hashes"),
        (lambda text: text + " ..." * 30, "too many ellipsis"),
        (lambda text: "- " + text.replace(". ", ".\n- "), "too many bullets"),
        (lambda text: text.replace(". ", "...\n") + " The end..." * 2, "too many end ellipsis"),
        (lambda text: text + " 12345" * 50, "below alpha threshold"),
        (lambda text: "lorem ipsum dolor sit amet " * 20, "too few stop words"),
        (lambda text: " \n ", "empty"),
    ],
)
def test_gopher(change: Any, reason: str | None) -> None:
    assert run(Gopher(), change(ENGLISH))[0] == reason


def test_gopher_goes_by_the_language() -> None:
    assert run(Gopher(), CHINESE * 2, language="zh")[0] is None
    assert run(Gopher(language="zh"), CHINESE * 2)[0] is None
    assert run(Gopher(), CHINESE * 2, language="en")[0] is not None
    assert run(Gopher(), CHINESE[:40], language="zh")[0] == "short doc"
    some = run(Gopher(stop_words=["的", "了", "在"]), CHINESE * 2, language="zh")
    none = run(Gopher(stop_words=["甲", "乙"]), CHINESE * 2, language="zh")
    assert (some[0], none[0]) == (None, "too few stop words")
    german = "Der Müller hat ein schönes Haus und einen großen Garten hinter seiner Mühle. " * 10
    assert run(Gopher(), german, language="de")[0] is None


def test_repetition() -> None:
    assert run(Repetition(), ENGLISH)[0] is None
    assert run(Repetition(), CHINESE, language="zh")[0] is None
    assert run(Repetition(), f"{ENGLISH}\n" * 4)[0] == "dup line frac"
    assert run(
        Repetition(lines=1, paragraphs=1, line_characters=1, paragraph_characters=1), f"{ENGLISH}\n" * 4
    )[0] == ("duplicated 5 n grams")
    assert run(Repetition(), f"{ENGLISH}\n\n" * 4)[0] == "dup para frac"
    assert run(Repetition(), ENGLISH + " buy now" * 30)[0] == "top 2 gram"
    assert run(Repetition(), CHINESE.replace("\n", "") * 2, language="zh")[0] == "duplicated 5 n grams"


def test_repetition_decides_as_datatrove_does() -> None:
    words = ENGLISH.split()
    draw = random.Random(3)
    ours, theirs = Repetition(language="en"), GopherRepetitionFilter(language=Words("en"))
    seen = set()
    for _ in range(400):
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 30))]
        text = draw.choice([" ", "\n", "\n\n"]).join(draw.choices(texts, k=draw.randint(1, 60)))
        expected = theirs.filter(Document(text, "0"))
        expected = None if expected is True else expected[1].replace("_", " ")
        assert run(ours, text)[0] == expected
        seen.add(expected)
    assert len(seen) > 6


def test_c4() -> None:
    text = (
        "Home\nAbout us\n"
        + ENGLISH.replace(". ", ".\n")
        + "\nPlease enable Javascript to go on.\nToo short.\nno end"
    )
    assert run(C4(), text) == (None, ENGLISH.replace(". ", ".\n"))
    assert run(C4(), ENGLISH[:200])[0] == "too few sentences"
    assert run(C4(min_sentences=2), ". ".join(ENGLISH.split(". ")[:2]) + ".")[0] is None
    assert run(C4(), ENGLISH + " { }.")[0] == "curly bracket"
    assert run(C4(curly_brackets=True), ENGLISH + " { }.")[0] is None
    assert run(C4(), ENGLISH + " Lorem ipsum dolor.")[0] == "lorem ipsum"
    assert "no end" in run(C4(punctuation=False, min_words=1), text)[1]


def test_c4_goes_by_the_language() -> None:
    text = "首页 新闻\n" + CHINESE + "\n上一页 下一页"
    assert run(C4(), text, language="zh") == (None, CHINESE)
    assert run(C4(punctuation=False), text, language="zh") == (None, text)
    assert run(C4(), text, language="en")[0] == "too few sentences"
    assert run(C4(), CHINESE[:60], language="zh")[0] == "too few sentences"


def test_c4_keeps_the_lines_that_datatrove_keeps() -> None:
    text = "\n".join(f"{sentence}.\n{sentence}" for sentence in ENGLISH.split(". "))
    theirs = Document(text, "0")
    assert C4QualityFilter(language="en").filter(theirs) is True
    assert run(C4(), text) == (None, theirs.text)


def test_fineweb() -> None:
    text = ENGLISH.replace(". ", ".\n")
    assert run(FineWeb(), text)[0] is None
    assert run(FineWeb(), text.replace(".", ""))[0] == "line punct ratio"
    assert run(FineWeb(punctuated=0), text.replace(".", ""))[0] is None
    assert run(FineWeb(), text.replace(" ", ".\n"))[0] == "short line ratio"
    assert run(FineWeb(short=1), text.replace(" ", ".\n"))[0] == "char dup ratio"
    assert run(FineWeb(short=1, duplicates=1), text.replace(" ", ".\n"))[0] == "list ratio"
    assert run(FineWeb(), CHINESE, language="zh")[0] is None


class NoShouting:
    def __init__(self, most: float = 0.3) -> None:
        self.most = most

    def __call__(self, document: Document) -> str | None:
        capitals = sum(character.isupper() for character in document.text)
        return "shouting" if capitals > self.most * len(document.text) else None


def test_a_filter_of_ones_own_is_a_small_class() -> None:
    assert run(NoShouting(), ENGLISH)[0] is None
    assert run(NoShouting(), ENGLISH.upper())[0] == "shouting"
    assert run(NoShouting(most=1), ENGLISH.upper())[0] is None


def test_words() -> None:
    assert Words("en").word_tokenize("Don't pay $3.50, e.g. now...") == [
        "Don't", "pay", "$", "3.50", ",", "e.g", ".", "now", "...",
    ]  # fmt: skip
    assert Words("zh").word_tokenize("我们在北京，学习 AI") == ["我们", "在", "北京", "，", "学习", "AI"]
    assert Words("ja").word_tokenize("東京 2024") == ["東", "京", "2024"]
    assert Words("en").sent_tokenize('One. Two? "Three!" 3.5 four') == [
        "One.",
        "Two?",
        '"Three!"',
        "3.5 four",
    ]
    assert Words("zh").sent_tokenize("一。二！“三？”四") == ["一。", "二！", "“三？”", "四"]
    assert Words("en").sent_tokenize(" \n") == []
    assert Words("en") == pickle.loads(pickle.dumps(Words("en"))) != Words("zh")
