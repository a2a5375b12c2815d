"""The tokenizer: text to ids and back, with ids identical to the Hugging Face ecosystem.

A thin wrapper of `tokenizers`. Every shop goes through it, so a chat served is cut into the same tokens as the
documents trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lineshaft.base.errors import BadCheckpoint, RequestError, UnsupportedModel
from lineshaft.base.files import digest

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """A tokenizer.json with its special tokens. Safe to share between threads: nothing is changed after loading."""

    def __init__(self, description: str, *, bos: str | None = None, eos: str | None = None, chat_template: str | None = None) -> None:
        """`description` is the content of a tokenizer.json; `bos` and `eos` are tokens in it. Raises BadCheckpoint."""
        self._description = description
        self._plain = _build(description)
        self._plain.encode_special_tokens = True  # the library's name for "treat their text like any other text"
        self._vocabulary: dict[str, int] = self._plain.get_vocab(with_added_tokens=True)
        if not self._vocabulary:
            raise BadCheckpoint("the tokenizer has no tokens at all: restore its tokenizer.json")
        self.vocab_size = max(self._vocabulary.values()) + 1
        """Every id is below this."""
        self.bos, self.eos = bos or "", eos or ""
        """Text of the special tokens, "" where there is none."""
        self.bos_id, self.eos_id = self._id_of(bos, "bos_token"), self._id_of(eos, "eos_token")
        self.chat_template = chat_template
        """Jinja source that turns messages into one text, or None."""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where present.

        Raises BadCheckpoint when the first is missing, any can't be read, or a named token is not in the vocabulary.
        """
        if not (folder / TOKENIZER_FILE).is_file():
            raise BadCheckpoint(f"{folder}: no {TOKENIZER_FILE}; save it there with transformers' `AutoTokenizer(...).save_pretrained`")
        config = _read_config(folder / CONFIG_FILE)
        template_file = folder / TEMPLATE_FILE
        template = _read_text(template_file) if template_file.is_file() else _template(config.get("chat_template"))
        try:
            return cls(
                _read_text(folder / TOKENIZER_FILE),
                bos=_content(config.get("bos_token")),
                eos=_content(config.get("eos_token")),
                chat_template=template,
            )
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{folder}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; nothing is added, and the text of a special token is cut up like any other text.

        Raises RequestError for text that has no UTF-8 form (half of a surrogate pair) or holds what the vocabulary can't spell.
        """
        ids: list[int] = _encoded(self._plain, text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        for text in texts:
            _check_unicode(text)
        return [item.ids for item in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_templated(self, text: str) -> list[int]:
        """Ids of a text that a chat template rendered: special tokens in it are themselves; none is added."""
        ids: list[int] = _encoded(self._templated, text).ids
        return ids

    def encode_placed(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_templated`, and for each id the first character that it stands for and the one behind the last.

        Where a character takes several tokens, all of them have its place.
        """
        encoding = _encoded(self._templated, text)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of `ids`, that of special tokens only when they are to be kept; bytes that form no character become U+FFFD."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=not keep_special)
        return text

    def token_text(self, number: int) -> str | None:
        """The text of one token, also of a special one, for people to read; None for an id without a token."""
        if self._plain.id_to_token(number) is None:
            return None
        text: str = self._plain.decode([number], skip_special_tokens=False)
        return text

    def vocabulary_sha256(self) -> str:
        """A hash of which token has which id."""
        return digest(self._vocabulary)

    def token_bytes(self) -> list[bytes]:
        """For each id the raw bytes it stands for; b"" for special tokens and for ids without a token.

        Byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek) and SentencePiece-like pieces with byte fallback (Llama 2, Gemma).
        In the latter a piece keeps the space it begins with, also at the start of a text, where `decode` drops it.
        Raises UnsupportedModel for any other decoder.
        """
        piece_bytes = _piece_decoder(json.loads(self._description).get("decoder"))
        added = self._plain.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for piece, number in self._vocabulary.items():
            if number not in added:
                table[number] = piece_bytes(piece)
            elif not added[number].special:
                table[number] = added[number].content.encode()
        return table

    @cached_property
    def _templated(self) -> tokenizers.Tokenizer:
        # A second object, because switching `encode_special_tokens` to and fro would race between threads.
        templated = _build(self._description)
        # Nothing is to be added, so all that a post-processor could do is to take the spaces out of the tokens' places.
        templated.post_processor = None
        return templated

    def _id_of(self, token: str | None, field: str) -> int | None:
        if token is None:
            return None
        if token not in self._vocabulary:
            raise BadCheckpoint(f'{field} "{token}" is not in the vocabulary: {CONFIG_FILE} belongs to another {TOKENIZER_FILE}')
        return self._vocabulary[token]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each of the 256 bytes: visible Latin-1 stays, the rest moves to U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET = byte_alphabet()


def _build(description: str) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the library raises the bare class for whatever it cannot parse
        raise BadCheckpoint(f"{TOKENIZER_FILE} is not a tokenizer that `tokenizers` {tokenizers.__version__} can read: {error}") from None
    built.no_padding()
    built.no_truncation()
    return built


def _encoded(library: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    _check_unicode(text)
    try:
        encoding: tokenizers.Encoding = library.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises the bare class where a vocabulary has no token for a text and none for "unknown"
        raise RequestError(f"the tokenizer can't spell this text: {error}") from None
    return encoding


def _piece_decoder(decoder: Any) -> Callable[[str], bytes]:
    steps = _steps(decoder)
    if steps == ["ByteLevel"]:
        return _alphabet_bytes
    if "ByteFallback" in steps and ("Replace" in steps or "Metaspace" in steps):
        return _fallback_bytes
    raise UnsupportedModel(
        f"the tokenizer's decoder ({', '.join(steps) or 'none'}) says nothing about single tokens' bytes: "
        "byte-level BPE and SentencePiece-like pieces with byte fallback are supported"
    )


def _alphabet_bytes(piece: str) -> bytes:
    if _ALPHABET.keys() >= set(piece):
        return bytes(_ALPHABET[letter] for letter in piece)
    return piece.encode()  # as the library's decoder does with pieces that were put in unspelled


def _fallback_bytes(piece: str) -> bytes:
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(byte[1], 16)])
    return piece.replace("\u2581", " ").encode()


def _steps(decoder: Any) -> list[str]:
    """Types of the decoder's steps, sequences opened."""
    if not decoder:
        return []
    if decoder["type"] == "Sequence":
        return [name for step in decoder["decoders"] for name in _steps(step)]
    return [decoder["type"]]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadCheckpoint(f"{path}: not UTF-8 ({error}); restore the file") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except ValueError as error:
        raise BadCheckpoint(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{path}: expected a JSON object; restore the file")
    return config


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: a text, or an object that holds it."""
    value = token.get("content") if isinstance(token, dict) else token
    if value is not None and not isinstance(value, str):
        raise BadCheckpoint(f"{CONFIG_FILE}: a special token must be a text or an object with `content`, got {token!r}")
    return value


def _template(value: Any) -> str | None:
    """The chat template: a text, or the one called `default` of a list of named ones."""
    if isinstance(value, list):
        value = next((item.get("template") for item in value if item.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise BadCheckpoint(f"{CONFIG_FILE}: chat_template must be a text, got {type(value).__name__}")
    return value


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode: character {error.start} is half of a surrogate pair") from None
