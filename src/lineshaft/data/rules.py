"""Filter rules: each looks at one cleaned text and gives the reason to drop it, or None.

Words are counted in a way that is fair to languages written without spaces: each Han character, kana, hangul syllable,
and each letter of Thai, Lao, Khmer and Burmese is one; elsewhere a run of non-space characters that
has a letter or digit is one.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property

from pydantic import Field

from lineshaft.base.config import Config


class RulesConfig(Config):
    """Thresholds of the filter. The defaults keep short reviews and reference texts, and drop what nobody would read."""

    min_words: int = Field(default=10, ge=0)
    """Fewest words; a Chinese character counts as one."""
    min_letter_share: float = Field(default=0.4, ge=0, le=1)
    """Smallest share of letters and digits among the characters that are not space."""
    max_repeated_share: float = Field(default=0.6, gt=0, le=1)
    """Largest share of a text that may be repeats: of lines seen before in it, or of one three-word phrase."""
    max_mean_word: float = Field(default=24.0, gt=0)
    """Largest mean length of a word, in characters: more is base64, minified code or hex dumps."""


_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
    "\u1100-\u11ff\u3041-\u3096\u30a1-\u30fa\u30fc-\u30ff\u3131-\u318e\u31f0-\u31ff\uac00-\ud7a3\uff66-\uff9f"  # kana, hangul
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}][^\s{_UNSPACED}]*")
_LETTER = re.compile(r"[^\W_]")
_SAME_SYMBOL = re.compile(r"([^\w\s]|_)\1{2,}")
_REPEATS_FROM_WORDS = 12
"""Shorter texts repeat themselves without being spam: "very good, very good, thanks"."""


class Text:
    """A text with what several rules want to know of it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Its words, as counted by the rules."""
        return _WORD.findall(self.text)


def too_few_words(text: Text, config: RulesConfig) -> str | None:
    """Fewer than `min_words` words."""
    return "too_few_words" if len(text.words) < config.min_words else None


def few_letters(text: Text, config: RulesConfig) -> str | None:
    """Mostly symbols: tables of punctuation, ASCII art, what is left of a binary file. A run of one symbol counts once."""
    visible = len("".join(_SAME_SYMBOL.sub(r"\1", text.text).split()))
    return "few_letters" if len(_LETTER.findall(text.text)) < config.min_letter_share * visible else None


def repetitive(text: Text, config: RulesConfig) -> str | None:
    """The same lines again and again, or one phrase of three words that fills the text."""
    lines = [line.strip() for line in text.text.split("\n") if line.strip()]
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    if len(lines) > 3 and repeated > config.max_repeated_share * sum(map(len, lines)):
        return "repetitive"
    if len(text.words) < _REPEATS_FROM_WORDS:
        return None
    return "repetitive" if _one_phrase_fills(text.words, config.max_repeated_share) else None


def long_words(text: Text, config: RulesConfig) -> str | None:
    """Words of absurd length on average."""
    return "long_words" if sum(map(len, text.words)) > config.max_mean_word * max(len(text.words), 1) else None


def _one_phrase_fills(words: list[str], share: float) -> bool:
    """Whether more than this share of the words lies in occurrences of the most frequent phrase of three."""
    folded = [word.casefold() for word in words]
    phrases = list(zip(folded, folded[1:], folded[2:], strict=False))
    top, count = Counter(phrases).most_common(1)[0]
    if 3 * count <= share * len(words):
        return False
    covered = {place + offset for place, phrase in enumerate(phrases) if phrase == top for offset in range(3)}  # they may overlap
    return len(covered) > share * len(words)


RULES: Mapping[str, Callable[[Text, RulesConfig], str | None]] = {
    "too_few_words": too_few_words,
    "few_letters": few_letters,
    "repetitive": repetitive,
    "long_words": long_words,
}
"""All rules in the order they are asked; the first reason counts."""


def reason_to_drop(text: str, config: RulesConfig) -> str | None:
    """The first rule's reason against the text, or None to keep it."""
    looked_at = Text(text)
    return next((reason for rule in RULES.values() if (reason := rule(looked_at, config))), None)


class Seen:
    """Remembers texts by hash, 16 bytes each, to find exact duplicates."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def before(self, text: str) -> bool:
        """Whether an equal text came before; case and the amount of white space make no difference."""
        digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]
        known = digest in self._digests
        self._digests.add(digest)
        return known
