"""Tokenizers: trained with Hugging Face `tokenizers`, or an existing tokenizer.json.

Text is encoded as text: the literal "<|endoftext|>" in a document becomes ordinary tokens, never the special
one, which only preparation writes.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.cli import one_line

# The special tokens of every tokenizer of this project.
END_OF_TEXT = "<|endoftext|>"  # ends a document; also what a text starts from
UNKNOWN = "<|unknown|>"  # only where the algorithm cannot spell every text

TRAINING_BYTES = 20_000_000  # the counts of distinct words, and so memory, grow with it
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 characters that stand for bytes


class TokenizerRecipe(Protocol):
    """lossless: decoding what was encoded gives the text back, except where an UNKNOWN token says that it
    cannot. training_bytes: how many of the first bytes of the training text are looked at."""

    lossless: bool
    training_bytes: int

    def train(self, texts: Iterable[str]) -> Tokenizer: ...

    def inputs(self) -> dict[str, Any]:
        """Files that the tokenizer depends on besides the text."""
        ...


class _Trained:
    """What the trained tokenizers share."""

    lossless = True

    def __init__(self, training_bytes: int = TRAINING_BYTES) -> None:
        if training_bytes < 1:
            raise ValueError(f"tokenizer.training_bytes: {training_bytes} is not positive")
        self.training_bytes = training_bytes

    def inputs(self) -> dict[str, Any]:
        return {}


class _Subwords(_Trained):
    """Pieces of bytes, as many as asked for: what BPE and Unigram share."""

    def __init__(self, vocabulary_size: int, training_bytes: int = TRAINING_BYTES) -> None:
        super().__init__(training_bytes)
        self.vocabulary_size = _at_least(vocabulary_size, len(ALPHABET) + 1)

    def _fit(self, model: models.Model, trainer: Any, texts: Iterable[str]) -> Tokenizer:
        tokenizer = _byte_level(model)
        settings = {"special_tokens": [END_OF_TEXT], "initial_alphabet": ALPHABET, "show_progress": False}
        tokenizer.train_from_iterator(texts, trainer(vocab_size=self.vocabulary_size, **settings))
        return tokenizer


class BPE(_Subwords):
    """Byte-level byte-pair encoding as in GPT-2 (Radford et al. 2019). Lossless on any text.

    vocabulary_size: at most; a small corpus may give fewer. At least 257: every byte and END_OF_TEXT.
    """

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return self._fit(models.BPE(), trainers.BpeTrainer, texts)


class Unigram(_Subwords):
    """Unigram language model (Kudo 2018, arXiv 1804.10959) over bytes, so that it is lossless on any text.

    vocabulary_size: at most; at least 257, as for BPE.
    """

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return self._fit(models.Unigram(), trainers.UnigramTrainer, texts)


class WordPiece(_Trained):
    """WordPiece with the pre-tokenizer of BERT (Devlin et al. 2018). Not lossless: white space is lost, and
    what has no piece becomes UNKNOWN.

    lowercase: fold case and strip accents, as in the uncased models.
    """

    lossless = False

    def __init__(
        self, vocabulary_size: int, lowercase: bool = True, training_bytes: int = TRAINING_BYTES
    ) -> None:
        super().__init__(training_bytes)
        self.vocabulary_size = _at_least(vocabulary_size, 3)
        self.lowercase = lowercase

    def train(self, texts: Iterable[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocabulary_size, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


class Characters(_Trained):
    """One token per Unicode character of the training text; any other character is UNKNOWN."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return _symbols([END_OF_TEXT, UNKNOWN, *sorted(seen)], unknown=UNKNOWN)


class Bytes(_Trained):
    """One token per byte of UTF-8; nothing is learnt."""

    def __init__(self) -> None:
        super().__init__()

    def train(self, texts: Iterable[str]) -> Tokenizer:
        tokenizer = _byte_level(_symbols([END_OF_TEXT, *ALPHABET], unknown=None).model)
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer


class Existing:
    """A tokenizer.json made elsewhere. END_OF_TEXT is added where it has none; what it adds around a text by
    itself (a start token, say) and its truncation are left off. Whether it is lossless is only reported."""

    lossless = False
    training_bytes = 0

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"tokenizer.path: {path} is not a file; name a tokenizer.json")

    def train(self, texts: Iterable[str]) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.path: {self.path} is no tokenizer.json: {one_line(error)}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer

    def inputs(self) -> dict[str, Any]:
        status = self.path.stat()
        return {str(self.path.resolve()): [status.st_size, status.st_mtime_ns]}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers.AutoTokenizer.from_pretrained(folder) needs."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(UNKNOWN) is not None:
        settings["unk_token"] = UNKNOWN
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that save_tokenizer wrote, encoding special tokens that stand in a text as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # the file does not keep it
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: an existing tokenizer may leave ids out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def capped(texts: Iterator[str], size: int) -> Iterator[str]:
    """The texts up to `size` bytes of UTF-8, the last one included."""
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _symbols(vocabulary: list[str], unknown: str | None) -> Tokenizer:
    """One token per character: byte-pair encoding without a merge. Cutting off lines lets its cache work."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([token for token in (END_OF_TEXT, unknown) if token])
    return tokenizer


def _at_least(vocabulary_size: int, least: int) -> int:
    if vocabulary_size < least:
        raise ValueError(f"tokenizer.vocabulary_size: {vocabulary_size} is below {least}; choose more")
    return vocabulary_size
