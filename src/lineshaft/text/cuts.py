"""How tokenizers cut a text before merges: merges stay inside what one of these patterns matches.

llama.cpp holds such patterns as code, under names (its src/llama-vocab.cpp), so a GGUF file can only carry a tokenizer that is cut by
one of those. "words" is our own and has no name there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Cut = Literal["words", "llama3", "qwen2", "deepseek3"]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CUTS: Mapping[Cut, tuple[str, ...]] = {
    # a word with the space before it, up to three digits, symbols, line ends, indentation
    "words": (r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*\n+|\s+(?!\S)|\s+",),
    "llama3": (_ENGLISH + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_ENGLISH + r"\p{N}" + _REST,),
    "deepseek3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""Name to patterns, each applied to what the one before it left in a piece."""
