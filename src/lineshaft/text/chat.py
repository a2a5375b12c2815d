"""Chat templates: messages to the one text a model was trained to continue.

A template comes with the checkpoint, so it is foreign code: it runs in Jinja's sandbox and sees messages, not Python.
What it may use is what transformers offers, so that both render the same text.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lineshaft.base.errors import RequestError

Span: TypeAlias = tuple[int, int]
"""First index and the one behind the last."""

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What template code can raise by itself; anything else is a fault of ours and stays visible."""


@dataclass(frozen=True)
class Rendered:
    """What a template made of the messages."""

    text: str
    spoken: list[Span] | None
    """Characters that the assistant wrote, as the template's `{% generation %}` blocks mark them; [] where it has none. None when
    such a block stands inside a macro, a filter or a `set` block, where its place in the text is not known."""


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The text for `messages` (each with "role" and "content"), ending where the assistant begins if so asked.

    `bos` and `eos` are the texts of the special tokens, "" where there is none. Raises RequestError when the template
    refuses the messages, or can't be run.
    """
    return render_marked(template, messages, bos=bos, eos=eos, add_generation_prompt=add_generation_prompt, tools=tools).text


def render_marked(
    template: str,
    messages: list[dict[str, Any]],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
    now: datetime | None = None,
) -> Rendered:
    """`render_chat` that also tells which characters are the assistant's. `now` stands for the time where a template asks for it."""
    rendering = _Rendering(now)
    before = _current.set(rendering)
    try:
        pieces = _compiled(template).generate(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        )
        for piece in pieces:
            rendering.pieces.append(piece)
            rendering.length += len(piece)
    except _FAILURES as error:
        raise RequestError(f"the model's chat template can't render these messages: {error}", "messages") from None
    finally:
        _current.reset(before)
    return rendering.finished()


def spoken_tokens(spoken: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
    """Ranges of tokens that stand, whole or in part, for the assistant's characters.

    `spoken`: sorted ranges of characters. `offsets`: the range of characters behind each token. Tokens that share a
    character, since each holds some of its bytes, go together. (transformers loses the later ones of those at a range's end.)
    """
    ends = [stop for _, stop in spoken]

    def said(place: int) -> bool:
        first, stop = offsets[place]
        near = bisect_right(ends, first)  # the first range that ends behind the token's beginning
        return near < len(spoken) and spoken[near][0] < max(stop, first + 1)

    runs = [(mine, list(places)) for mine, places in groupby(range(len(offsets)), said)]
    return [(places[0], places[-1] + 1) for mine, places in runs if mine]


@dataclass
class _Rendering:
    """A rendering under way."""

    now: datetime | None
    pieces: list[str] = field(default_factory=list)
    length: int = 0
    """Of all pieces."""
    blocks: list[tuple[int, str]] = field(default_factory=list)
    """Where each generation block seemed to begin, and its text."""

    def finished(self) -> Rendered:
        text = "".join(self.pieces)
        placed = all(text.startswith(words, first) for first, words in self.blocks)
        return Rendered(text, [(first, first + len(words)) for first, words in self.blocks if words] if placed else None)


_current: ContextVar[_Rendering] = ContextVar("rendering")
"""Compiled templates are shared between threads, so what belongs to one rendering lies here."""


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace, "dict": _new_dict}
    return sandbox.from_string(template)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore, through which Python's insides could be reached."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        for name in dict(*args, **values):
            _refuse_underscore(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training masks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_spoken"), [], [], body).set_lineno(line)

    def _spoken(self, caller: Callable[[], str]) -> str:
        rendering, words = _current.get(), caller()
        rendering.blocks.append((rendering.length, words))
        return words


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f'"{name}": a namespace has no names that begin with an underscore')


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return (_current.get().now or datetime.now()).strftime(pattern)  # local time, as transformers does


def _new_dict(*args: Any, **values: Any) -> dict[str, Any]:
    """A function instead of the class, whose attributes lead to Python's insides."""
    return dict(*args, **values)
