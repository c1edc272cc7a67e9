"""The quality rules of well-known corpora as stages, over the filters of datatrove.

Their defaults are those of the papers. The language that they go by is the document's own, as Language found
it, unless they are given one; where neither is known it is English.
"""

from typing import TYPE_CHECKING, Any

from data.corpus.languages import LANGUAGES

if TYPE_CHECKING:  # datatrove takes a while to import; a stage that is only configured does without
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter

REASONS = {"gopher_enough_stop_words": "too few stop words"}  # where datatrove's name misleads


class _Rules:
    """What the stages over datatrove's filters share: a filter for each language, made when first needed."""

    def __init__(self, language: str | None) -> None:
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"language: {language!r} is not known; use an ISO 639 code, as en or zh")
        self.language = language
        self._filters: dict[str, BaseFilter] = {}

    def __call__(self, document: "Document") -> str | None:
        if not document.text.strip():
            return "empty"
        language = self.language or document.metadata.get("language") or "en"
        if language not in self._filters:
            from data.corpus.words import Words

            self._filters[language] = self._filter(language, Words(language))
        result = self._filters[language].filter(document)
        kept, reason = result if isinstance(result, tuple) else (result, "")
        return None if kept else REASONS.get(reason, reason.removeprefix("gopher_").replace("_", " "))

    def _filter(self, language: str, words: Any) -> "BaseFilter":
        """The filter for documents of a language; `words` goes where datatrove wants a language."""
        raise NotImplementedError


class Gopher(_Rules):
    """Quality rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).

    min_words, max_words: of a document. min_stop_words: how many different ones of stop_words a text must
    have; the list of the paper is English, so that other languages are asked for none unless a list is given.
    Where a script has no spaces, the mean length of words is not asked for.
    """

    def __init__(
        self,
        min_words: int = 50,
        max_words: int = 100_000,
        min_stop_words: int = 2,
        stop_words: list[str] | None = None,
        language: str | None = None,
    ) -> None:
        super().__init__(language)
        if not 0 < min_words < max_words:
            raise ValueError(f"min_words: {min_words} is not between 1 and max_words ({max_words})")
        self.min_words = min_words
        self.max_words = max_words
        self.min_stop_words = min_stop_words
        self.stop_words = stop_words

    def _filter(self, language: str, words: Any) -> "BaseFilter":
        from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter

        from data.corpus.words import SPACELESS

        lengths = {"min_avg_word_length": None, "max_avg_word_length": None} if language in SPACELESS else {}
        return GopherQualityFilter(
            min_doc_words=self.min_words,
            max_doc_words=self.max_words,
            min_stop_words=self.min_stop_words if self.stop_words or language == "en" else None,
            stop_words=self.stop_words,
            language=words,
            **lengths,
        )


class Repetition(_Rules):
    """Repetition rules of Gopher (arXiv 2112.11446, table A1): repeated lines, paragraphs and word n-grams.

    lines, paragraphs: the largest share of duplicates; line_characters, paragraph_characters: the same,
    counted in characters.
    """

    def __init__(
        self,
        lines: float = 0.3,
        paragraphs: float = 0.3,
        line_characters: float = 0.2,
        paragraph_characters: float = 0.2,
        language: str | None = None,
    ) -> None:
        super().__init__(language)
        self.lines = lines
        self.paragraphs = paragraphs
        self.line_characters = line_characters
        self.paragraph_characters = paragraph_characters

    def _filter(self, language: str, words: Any) -> "BaseFilter":
        from data.corpus.words import QuickRepetition

        return QuickRepetition(
            dup_line_frac=self.lines,
            dup_para_frac=self.paragraphs,
            dup_line_char_frac=self.line_characters,
            dup_para_char_frac=self.paragraph_characters,
            language=words,
        )


class C4(_Rules):
    """Rules of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2), without its list of bad words.

    Drops lines that do not end in a terminal mark (unless punctuation is false), have fewer than min_words
    words, or speak of JavaScript and cookies; drops documents with a curly bracket (unless curly_brackets is
    true), "lorem ipsum", or fewer than min_sentences sentences left. Where a script has no spaces, its own
    marks end a line, and words of a line are not counted.
    """

    def __init__(
        self,
        punctuation: bool = True,
        min_words: int = 3,
        min_sentences: int = 5,
        curly_brackets: bool = False,
        language: str | None = None,
    ) -> None:
        super().__init__(language)
        self.punctuation = punctuation
        self.min_words = min_words
        self.min_sentences = min_sentences
        self.curly_brackets = curly_brackets

    def _filter(self, language: str, words: Any) -> "BaseFilter":
        from datatrove.pipeline.filters.c4_filters import C4QualityFilter

        from data.corpus.words import SPACELESS, LinesOfSpaceless

        spaceless = language in SPACELESS
        kind = LinesOfSpaceless if spaceless and self.punctuation else C4QualityFilter
        return kind(
            filter_no_terminal_punct=self.punctuation and not spaceless,
            min_words_per_line=-1 if spaceless else self.min_words,
            min_num_sentences=self.min_sentences,
            filter_curly_bracket=not self.curly_brackets,
            language=words,
        )


class FineWeb(_Rules):
    """Rules that FineWeb adds (Penedo et al. 2024, arXiv 2406.17557, section 3.5).

    punctuated: the least share of lines that end in a terminal mark; short: the most of short_line characters
    or fewer; duplicates: the most characters in repeated lines; new_lines: the most line ends per word.
    """

    def __init__(
        self,
        punctuated: float = 0.12,
        short: float = 0.67,
        short_line: int = 30,
        duplicates: float = 0.01,
        new_lines: float = 0.3,
        language: str | None = None,
    ) -> None:
        super().__init__(language)
        self.punctuated = punctuated
        self.short = short
        self.short_line = short_line
        self.duplicates = duplicates
        self.new_lines = new_lines

    def _filter(self, language: str, words: Any) -> "BaseFilter":
        from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter

        return FineWebQualityFilter(
            line_punct_thr=self.punctuated,
            short_line_thr=self.short,
            short_line_length=self.short_line,
            char_duplicates_ratio=self.duplicates,
            new_line_ratio=self.new_lines,
            language=words,
        )
