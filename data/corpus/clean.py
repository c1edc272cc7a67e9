"""Stages that look at one document at a time: they clean its text, or give the reason to drop it.

A stage is called with a datatrove Document, edits its text and metadata in place, and returns the reason to
drop it, or None to keep it. So a filter of one's own is one small class:

    class NoShouting:
        def __init__(self, most: float = 0.3) -> None:
            self.most = most  # share of capitals

        def __call__(self, document):
            capitals = sum(character.isupper() for character in document.text)
            return "shouting" if capitals > self.most * len(document.text) else None

and `own: {_target_: my_filters.NoShouting, most: 0.2}` among the stages of a corpus. It is pickled to its
workers, and what it does may depend on nothing but its arguments and the document: the corpus is then the
same however it is dealt out.
"""

import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from data.corpus.languages import LANGUAGES
from data.corpus.personal import Personal
from data.corpus.quality import C4, FineWeb, Gopher, Repetition

if TYPE_CHECKING:  # datatrove takes a while to import; a stage that is only configured does without
    from datatrove.data import Document

__all__ = ["C4", "FineWeb", "Gopher", "Language", "MainText", "Personal", "Repair", "Repetition"]

# Markup, and not a text about it, begins with one of these.
HTML = re.compile(
    r"[\s\ufeff]*+(?>(?:<!--.{0,9000}?-->|<\?xml[^>]{0,200}>)\s*+){0,5}+"
    r"<(?:!doctype\s+html|html|head|body|title|meta|link|script|style|div|section|article|main|table|p|h[1-6])\b",
    re.IGNORECASE | re.DOTALL,
)
SPACES = re.compile(r"(?<=[^\s])[^\S\n]{2,}")  # inside a line; indentation stays
BLANK_LINES = re.compile(r"\n{3,}")
LINE_END = re.compile("\r\n|[\r\v\f\u2028\u2029]")
ESCAPES = re.compile("\x1b\\[[0-9;]{0,20}[A-Za-z]")  # colours of a terminal
# Control characters, soft hyphens, zero-width spaces, byte order marks, halves of surrogate pairs. Joiners,
# which some scripts need, stay.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff]")


class MainText:
    """The main text of an HTML page, without navigation, comments and advertisements (trafilatura).

    Documents that are not HTML pass unchanged; a page without main text is dropped. precision: rather leave
    out than take in what may not belong to the main text.
    """

    def __init__(self, precision: bool = True, tables: bool = True) -> None:
        self.precision = precision
        self.tables = tables

    def __call__(self, document: "Document") -> str | None:
        if not HTML.match(document.text):
            return None
        from trafilatura import extract

        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
        # Its own removal of duplicates remembers other documents: the result would depend on their order.
        text = extract(
            document.text.replace("\0", ""),
            favor_precision=self.precision,
            include_comments=False,
            include_tables=self.tables,
            deduplicate=False,
        )
        if not text:
            return "no main text"
        document.text = text
        return None


class Repair:
    """Text as it was meant: mojibake undone (ftfy), Unicode NFC, no control or invisible characters.

    Line ends become newlines; runs of spaces inside a line and of blank lines become one; what ends a line in
    white space loses it. Quotes, ligatures and full-width characters stay as they are.
    """

    def __call__(self, document: "Document") -> str | None:
        from ftfy import fix_encoding
        from ftfy.badness import is_bad

        text = ESCAPES.sub("", LINE_END.sub("\n", document.text))
        if is_bad(text):  # by line: others may be right
            text = "\n".join(fix_encoding(line) if is_bad(line) else line for line in text.split("\n"))
        text = normalize("NFC", INVISIBLE.sub("", LINE_END.sub("\n", text)))
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        document.text = BLANK_LINES.sub("\n\n", SPACES.sub(" ", text)).strip("\n")
        return None if document.text else "empty"


class Language:
    """The language of a document by py3langid; metadata get `language` (ISO 639) and `language_score`.

    keep: languages that stay, None for all. least: the probability that must be reached. Of a long text the
    first CHARACTERS are looked at. Raises ValueError on a language that the model does not know.
    """

    CHARACTERS = 4000

    def __init__(self, keep: list[str] | None = None, least: float = 0.65) -> None:
        unknown = sorted(set(map(str, keep or ())) - LANGUAGES)
        if unknown:
            raise ValueError(f"keep: {', '.join(unknown)} is not known; use ISO 639 codes, as en or zh")
        if not 0 <= least <= 1:
            raise ValueError(f"least: {least} is no probability; give a number from 0 to 1")
        self.keep = None if keep is None else frozenset(keep)
        self.least = least

    def __call__(self, document: "Document") -> str | None:
        language, score = _identifier().classify(document.text[: self.CHARACTERS])
        document.metadata["language"] = language
        document.metadata["language_score"] = round(score, 4)
        if self.keep is not None and language not in self.keep:
            return "language"
        return "language unsure" if score < self.least else None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
