"""What a model of any family makes of a prompt, as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from data.tokenizer import CLS, END_OF_TEXT, MASK, PAD, SEP, SPECIAL, special_ids
from model.bert import BERT
from model.denoise import fill, generate_from
from model.generate import generate
from model.gpt import GPT
from model.t5 import T5

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not (yet) a character decode to
SENTINELS = SPECIAL["sentinels"]
_, HOLE, _ = SPECIAL["infilling"]
CANDIDATES = 5  # shown for each mask


def respond(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, *, to_the_end: bool = False, **sampling: Any
) -> Iterator[str]:
    """What the model makes of a prompt, in pieces of text. Prompts are read and checked before this returns.

    A decoder continues the prompt; where the prompt holds <|fim_middle|> once, it is what belongs there. An
    encoder fills every [MASK] and lists its likeliest tokens. An encoder-decoder gives what stands behind
    each sentinel <extra_id_N> of the prompt.

    sampling: as in `model.generate.generate`. to_the_end: always draw max_new_tokens tokens, which ranks that
    draw together have to, and cut at the end of the text after.

    Raises ValueError in one line for a prompt or number that cannot be.
    """
    ids = encoded_prompt(model, tokenizer, prompt)
    end_of_text = _end_of_text(tokenizer)
    end = None if to_the_end else end_of_text
    if isinstance(model, BERT):
        return _filled(model, tokenizer, ids)
    if isinstance(model, T5):
        pad = tokenizer.token_to_id(PAD)
        start = end_of_text if pad is None else pad
        tokens = generate_from(model, ids, start=start, end=end, **sampling)
        return _denoised(tokenizer, _cut(tokenizer, tokens))
    assert isinstance(model, GPT)
    tokens = generate(model, ids, end_of_text=end, **sampling)
    return decoded(tokenizer, ids, _cut(tokenizer, tokens))


def encoded_prompt(model: nn.Module, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens that a model is given for a prompt, in the form that it was trained on.

    Raises ValueError in one line, which begins with `prompt:`, where the model cannot take it.
    """
    end_of_text = _end_of_text(tokenizer)
    if isinstance(model, GPT):
        return _infilling(tokenizer, prompt, end_of_text)
    if isinstance(model, BERT):
        _, first, last, mask = special_ids(tokenizer, "masking")
        ids, own = [first, *_encoded(tokenizer, prompt, [MASK]), last], f"{CLS} and {SEP}"
        if mask not in ids:
            raise ValueError(f"prompt: holds no {MASK} for the model to fill; put one where it should")
    else:
        named = [*SENTINELS, *SPECIAL["denoisers"]]
        ids, own = [*_encoded(tokenizer, prompt, named), end_of_text], END_OF_TEXT
    most = int(model.sequence_length)  # type: ignore[arg-type]
    if len(ids) > most:
        raise ValueError(f"prompt: {len(ids)} tokens with {own}, and the model takes {most}; shorten it")
    return ids


def decoded(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens` after a prompt, in pieces that hold whole characters.

    Their concatenation is decode(prompt + tokens) without its beginning, decode(prompt). A token may end amid
    the bytes of a character, and what it decodes to depends on the token before (a space, say). So tokens are
    decoded together with the piece before them, and held back until they end with a whole character.
    """
    pending = list(prompt)
    shown = text = tokenizer.decode(pending)
    context = len(pending)
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text == shown or text.endswith(BROKEN):
            continue
        yield text[len(shown) :]
        pending = pending[context:]
        context = len(pending)
        shown = text = tokenizer.decode(pending)
    if text != shown:
        yield text[len(shown) :]  # the last bytes are no whole character


def _end_of_text(tokenizer: Tokenizer) -> int:
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None, "every tokenizer that data.tokenizer saves has it"
    return end_of_text


def _encoded(tokenizer: Tokenizer, prompt: str, special: Iterable[str]) -> list[int]:
    """The prompt's tokens, in which these special tokens mean themselves."""
    known = {name: id_ for name in special if (id_ := tokenizer.token_to_id(name)) is not None}
    if not known:
        return tokenizer.encode(prompt, add_special_tokens=False).ids
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, known))})", prompt):
        if part in known:
            ids.append(known[part])
        elif part:
            ids += tokenizer.encode(part, add_special_tokens=False).ids
    return ids


def _infilling(tokenizer: Tokenizer, prompt: str, end_of_text: int) -> list[int]:
    """The prompt; with a hole, prefix and suffix in PSM order (arXiv 2207.14255, section 3)."""
    if HOLE not in prompt:
        return tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text]
    try:
        prefix_id, middle_id, suffix_id = special_ids(tokenizer, "infilling")
    except ValueError as error:
        raise ValueError(f"prompt: holds {HOLE}, but {error}") from None
    before, _, after = prompt.partition(HOLE)
    prefix, suffix = (tokenizer.encode(part, add_special_tokens=False).ids for part in (before, after))
    return [end_of_text, prefix_id, *prefix, suffix_id, *suffix, middle_id]


def _cut(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[int]:
    """The tokens before the end of the text; all are drawn."""
    end, ended = tokenizer.token_to_id(END_OF_TEXT), False
    for token in tokens:
        ended = ended or token == end
        if not ended:
            yield token


def _denoised(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """A line for each sentinel: its name and the text behind it."""
    sentinels = {tokenizer.token_to_id(name): name for name in SENTINELS}
    span: list[int] = []
    for token in tokens:
        if token in sentinels:
            yield f"{tokenizer.decode(span)}\n{sentinels[token]} "
            span = []
        else:
            span.append(token)
    yield tokenizer.decode(span)


def _filled(model: BERT, tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The prompt with its masks filled by the likeliest tokens, then a line of candidates for each."""
    *_, mask = special_ids(tokenizer, "masking")
    p_MV = fill(model, ids, mask).cpu()
    best_M = iter(p_MV.argmax(-1).tolist())
    whole = [next(best_M) if token == mask else token for token in ids[1:-1]]
    yield f"\n{tokenizer.decode(whole)}\n"
    for p_V in p_MV:
        top = p_V.topk(CANDIDATES)
        shares = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        yield f"{MASK}: {', '.join(f'{tokenizer.decode([token])!r} {p:.1%}' for p, token in shares)}\n"
