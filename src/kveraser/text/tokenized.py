"""Tokenization with character offsets; special tokens in user text are read as text."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from kveraser.errors import InputError
from kveraser.text.spans import MessageRange

_ESCAPED = 0x10F000
"""Offset of the private-use code points that replace escaped characters while a text is rendered."""

_ESCAPABLE = 0x400
"""Code points below this can be escaped."""

_ESCAPES = re.compile(f"[{chr(_ESCAPED)}-{chr(_ESCAPED + _ESCAPABLE - 1)}]")


@dataclass(frozen=True)
class TokenizedText:
    """Text with its tokens.

    Attributes:
        text: rendered messages, or the user's own text.
        tokens: token ids.
        offsets: `(start, end)` of every token in `text`, in characters; both non-decreasing.
        messages: ranges of the messages in `text`.
        body_start: first character in `text` of the first message or the user's own text.
    """

    text: str
    tokens: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    messages: tuple[MessageRange, ...] = ()
    body_start: int = 0


# Special tokens in user text


def special_tokens(tokenizer: Any) -> list[str]:
    """Returns the texts that the tokenizer reads as control tokens, longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(texts, key=len, reverse=True)


def check_characters(text: str, what: str) -> None:
    """Check that a text can be tokenized.

    Raises:
        InputError: the text has a lone surrogate, or a private-use character that `escaped` needs.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has a lone surrogate at {error.start} ({text[error.start]!r}): repair or leave it out"
        ) from error
    reserved = _ESCAPES.search(text)
    if reserved is not None:
        raise InputError(
            f"{what} has the private character U+{ord(reserved[0]):X} at {reserved.start()}, which is reserved: "
            "leave it out"
        )


def escaped(value: Any, markers: Sequence[str]) -> Any:
    """Escape special tokens in `value`, so that `tokenize` reads them as text. Lengths do not change.

    Args:
        value: a text, or nested lists and mappings with texts.
        markers: see `special_tokens`; those of a single character can't be escaped.
    """
    if isinstance(value, Mapping):
        return {escaped(key, markers): escaped(item, markers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item, markers) for item in value]
    if not isinstance(value, str):
        return value
    for marker in markers:
        place = next((place for place, one in enumerate(marker[:-1]) if ord(one) < _ESCAPABLE), None)
        while place is not None and marker in value:
            value = value.replace(marker, f"{marker[:place]}{chr(_ESCAPED + ord(marker[place]))}{marker[place + 1 :]}")
    return value


def unescaped(text: str) -> str:
    """Undo `escaped`: returns the text as the user gave it and the model reads it."""
    return _ESCAPES.sub(lambda found: chr(ord(found[0]) - _ESCAPED), text)


# Tokens


def tokenize(
    tokenizer: Any,
    text: str,
    special: bool = False,
    follows: bool = False,
    messages: Sequence[MessageRange] = (),
    body_start: int = 0,
) -> TokenizedText:
    """Tokenize a text, which may be escaped; for the arguments see `encode` and `TokenizedText`.

    Raises:
        InputError: the text has a lone surrogate.
    """
    plain = unescaped(text)
    check_characters(plain, "the text")
    tokens, offsets = encode(tokenizer, text, special, follows)
    return TokenizedText(plain, tuple(tokens), tuple(offsets), tuple(messages), body_start)


def encode(
    tokenizer: Any, text: str, special: bool = False, follows: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the token ids of `text` and their `(start, end)` offsets in characters, which cover all of `text`.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: may be `escaped`; escaped special tokens are read as text.
        special: prepend the BOS token if the tokenizer uses one and the text does not begin with it. No EOS token is
            added.
        follows: the text continues another one, so no space is prepended.
    """
    # Tokenizing the two parts of a special token separately makes it ordinary text.
    cuts = [0, *(escape.end() for escape in _ESCAPES.finditer(text)), len(text)]
    tokens, offsets = list[int](), list[tuple[int, int]]()
    for start, end in pairwise(cuts):
        if start == end and start:
            continue
        piece = _encode(tokenizer, unescaped(text[start:end]), special and not start, follows or start > 0)
        tokens += piece[0]
        offsets += [(start + first, start + last) for first, last in piece[1]]
    return tokens, offsets


def _encode(tokenizer: Any, text: str, special: bool, follows: bool) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]
    unprefixed = _without_prefix(tokenizer) if follows else None
    if unprefixed is not None:
        # Text after a special token is tokenized as in a conversation that is rendered at once.
        markers = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        first = next((place for place, token in enumerate(tokens) if token in markers), len(tokens))
        cut = offsets[first][0] if first < len(tokens) else len(text)
        head = unprefixed.encode(text[:cut], add_special_tokens=False)
        tokens, offsets = [*head.ids, *tokens[first:]], [*head.offsets, *offsets[first:]]
    offsets = _covering(text, offsets)
    if special:
        whole = list(tokenizer(text)["input_ids"])
        leads = range(len(whole) - len(tokens) + 1)
        lead = next((lead for lead in leads if whole[lead : lead + len(tokens)] == tokens), 0)
        if tokens[:lead] == whole[:lead]:
            lead = 0
        tokens, offsets = whole[:lead] + tokens, [(0, 0)] * lead + offsets
    return tokens, offsets


_UNPREFIXED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _without_prefix(tokenizer: Any) -> Any:
    """Returns a copy of its `tokenizers.Tokenizer` that prepends no space; None if the original prepends none."""
    if tokenizer not in _UNPREFIXED:
        backend = tokenizer.backend_tokenizer
        parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
        given = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
        changed = {name: _unprefixed(part) for name, part in given.items()}
        copied = None
        if changed != given:
            copied = type(backend).from_str(json.dumps({**json.loads(backend.to_str()), **changed}))
            copied.no_truncation()
            copied.no_padding()
        _UNPREFIXED[tokenizer] = copied
    return _UNPREFIXED[tokenizer]


def _unprefixed(part: dict[str, Any]) -> dict[str, Any]:
    """Change a serialized normalizer or pre-tokenizer to prepend no space."""
    for inner in ("normalizers", "pretokenizers"):
        if inner in part:
            return {**part, inner: [_unprefixed(one) for one in part[inner] if one["type"] != "Prepend"]}
    if part["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part


def _covering(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Widen the offsets so that they cover all of `text`.

    Combining characters at the beginning of a gap go to the tokens before it: the tokenizer composed them with their
    letter. The rest of a gap, such as trimmed spaces, goes to the next token, or to the last one.
    """
    covering: list[tuple[int, int]] = []
    reached = 0

    def widen(end: int) -> None:
        """Extend the tokens that end at the gap to `end`."""
        for place in reversed(range(len(covering))):
            if covering[place][1] != reached:
                return
            covering[place] = covering[place][0], end

    for start, end in offsets:
        if start > reached:
            accented = reached
            while covering and accented < start and unicodedata.combining(text[accented]):
                accented += 1
            widen(accented)
            start = reached = accented
        covering.append((start, end))
        reached = max(reached, end)
    if reached < len(text):
        widen(len(text))
    return covering
