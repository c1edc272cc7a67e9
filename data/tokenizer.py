"""Tokenizers: trained with Hugging Face `tokenizers`, or an existing tokenizer.json.

Text is encoded as text: the literal "<|endoftext|>" in a document becomes ordinary tokens, never the special
one, which only preparation writes. What an objective writes into its samples ([MASK], sentinels, ...) are
special tokens too; a recipe takes them in sets, by the names in SPECIAL.
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

PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"  # named as in BERT (Devlin et al. 2018)
SPECIAL = {
    "masking": (PAD, CLS, SEP, MASK),
    "sentinels": tuple(f"<extra_id_{i}>" for i in range(100)),  # T5 (Raffel et al. 2019)
    "denoisers": ("[R]", "[S]", "[X]"),  # the modes of UL2 (Tay et al. 2022): regular, sequential, extreme
    "infilling": ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Bavarian et al. 2022
}

TRAINING_BYTES = 20_000_000  # the counts of distinct words, and so memory, grow with it
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 characters that stand for bytes


Special = list[str] | tuple[str, ...]


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
    """What the trained tokenizers share.

    special: names out of SPECIAL; their tokens follow END_OF_TEXT (and UNKNOWN) in the vocabulary.
    """

    lossless = True

    def __init__(self, training_bytes: int = TRAINING_BYTES, special: Special = ()) -> None:
        if training_bytes < 1:
            raise ValueError(f"tokenizer.training_bytes: {training_bytes} is not positive")
        self.training_bytes = training_bytes
        self.special = _tokens_of(special)

    def inputs(self) -> dict[str, Any]:
        return {}


class _Subwords(_Trained):
    """Pieces of bytes, as many as asked for: what BPE and Unigram share."""

    def __init__(
        self, vocabulary_size: int, training_bytes: int = TRAINING_BYTES, special: Special = ()
    ) -> None:
        super().__init__(training_bytes, special)
        self.vocabulary_size = _at_least(vocabulary_size, len(ALPHABET) + 1 + len(self.special))

    def _fit(self, model: models.Model, trainer: Any, texts: Iterable[str]) -> Tokenizer:
        tokenizer = _byte_level(model)
        settings = {"initial_alphabet": ALPHABET, "show_progress": False}
        special = [END_OF_TEXT, *self.special]
        tokenizer.train_from_iterator(
            texts, trainer(vocab_size=self.vocabulary_size, special_tokens=special, **settings)
        )
        return tokenizer


class BPE(_Subwords):
    """Byte-level byte-pair encoding as in GPT-2 (Radford et al. 2019). Lossless on any text.

    vocabulary_size: at most, special tokens included; a small corpus may give fewer. At least 257 and the
    special tokens: every byte and END_OF_TEXT.
    """

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return self._fit(models.BPE(), trainers.BpeTrainer, texts)


class Unigram(_Subwords):
    """Unigram language model (Kudo 2018, arXiv 1804.10959) over bytes, so that it is lossless on any text.

    vocabulary_size: as for BPE.
    """

    def train(self, texts: Iterable[str]) -> Tokenizer:
        return self._fit(models.Unigram(), trainers.UnigramTrainer, texts)


class WordPiece(_Trained):
    """WordPiece with the pre-tokenizer of BERT (Devlin et al. 2018). Not lossless: white space is lost, and
    what has no piece becomes UNKNOWN.

    vocabulary_size: at most, special tokens included. lowercase: fold case and strip accents, as in the
    uncased models; without, both are kept. Every CJK character is a word of its own.
    """

    lossless = False

    def __init__(
        self,
        vocabulary_size: int,
        lowercase: bool = True,
        training_bytes: int = TRAINING_BYTES,
        special: Special = (),
    ) -> None:
        super().__init__(training_bytes, special)
        self.vocabulary_size = _at_least(vocabulary_size, 3 + len(self.special))
        self.lowercase = lowercase

    def train(self, texts: Iterable[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocabulary_size,
            special_tokens=[END_OF_TEXT, UNKNOWN, *self.special],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


class Characters(_Trained):
    """One token per Unicode character of the training text; any other character is UNKNOWN."""

    def train(self, texts: Iterable[str]) -> Tokenizer:
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return _symbols([END_OF_TEXT, UNKNOWN, *self.special], sorted(seen), unknown=UNKNOWN)


class Bytes(_Trained):
    """One token per byte of UTF-8; nothing is learnt."""

    def __init__(self, special: Special = ()) -> None:
        super().__init__(special=special)

    def train(self, texts: Iterable[str]) -> Tokenizer:
        special = [END_OF_TEXT, *self.special]
        tokenizer = _byte_level(_symbols(special, ALPHABET, unknown=None).model)
        tokenizer.add_special_tokens(special)
        return tokenizer


class Existing:
    """A tokenizer.json made elsewhere. END_OF_TEXT and what `special` asks for are added where it has none;
    what it adds around a text by itself (a start token, say) and its truncation are left off. Whether it is
    lossless is only reported."""

    lossless = False
    training_bytes = 0

    def __init__(self, path: str, special: Special = ()) -> None:
        self.path = Path(path)
        self.special = _tokens_of(special)
        if not self.path.is_file():
            raise ValueError(f"tokenizer.path: {path} is not a file; name a tokenizer.json")

    def train(self, texts: Iterable[str]) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.path: {self.path} is no tokenizer.json: {one_line(error)}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens([END_OF_TEXT, *self.special])
        return tokenizer

    def inputs(self) -> dict[str, Any]:
        status = self.path.stat()
        return {str(self.path.resolve()): [status.st_size, status.st_mtime_ns]}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what transformers.AutoTokenizer.from_pretrained(folder) needs."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = _special(tokenizer)
    unknown = UNKNOWN if UNKNOWN in special else getattr(tokenizer.model, "unk_token", None)
    roles = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | ({"unk_token": unknown} if unknown else {})
    named = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    roles |= {role: token for role, token in named.items() if token in special}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "extra_special_tokens": [token for token in special if token not in roles.values()],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that save_tokenizer wrote, encoding special tokens that stand in a text as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # the file does not keep it
    return tokenizer


def special_ids(tokenizer: Tokenizer, name: str) -> list[int]:
    """The ids of a set of SPECIAL, in its order. Raises ValueError where the tokenizer lacks one of them."""
    ids = []
    for token in SPECIAL[name]:
        id_ = tokenizer.token_to_id(token)
        if id_ is None:
            raise ValueError(
                f"tokenizer.special: the tokenizer has no {token}, which the objective needs; "
                f"add {name} to tokenizer.special"
            )
        ids.append(id_)
    return ids


def all_special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of every special token, ascending: what no text is encoded to."""
    return sorted(_special(tokenizer).values())


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


def _symbols(special: list[str], characters: list[str], unknown: str | None) -> Tokenizer:
    """One token per character: byte-pair encoding without a merge. Cutting off lines lets its cache work."""
    ids = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: id_ for id_, token in sorted(added.items()) if token.special}


def _tokens_of(special: Special) -> list[str]:
    """The tokens of these sets, in the order of SPECIAL."""
    for name in special:
        if name not in SPECIAL:
            raise ValueError(f"tokenizer.special: no set {name}; there are {', '.join(SPECIAL)}")
    return [token for name, tokens in SPECIAL.items() if name in special for token in tokens]


def _at_least(vocabulary_size: int, least: int) -> int:
    if vocabulary_size < least:
        raise ValueError(f"tokenizer.vocabulary_size: {vocabulary_size} is below {least}; choose more")
    return vocabulary_size
