"""Chat templates: messages to the one text a model was trained to continue.

A template comes with the checkpoint, so it is foreign code: it runs in Jinja's sandbox and sees messages, not Python.
What it may use is what transformers offers, so that both render the same text.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lineshaft.base.errors import RequestError

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What template code can raise by itself; anything else is a fault of ours and stays visible."""


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
    try:
        return _compiled(template).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        )
    except _FAILURES as error:
        raise RequestError(f"the model's chat template can't render these messages: {error}", "messages") from None


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
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training masks; here it only renders."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f'"{name}": a namespace has no names that begin with an underscore')


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as transformers does


def _new_dict(*args: Any, **values: Any) -> dict[str, Any]:
    """A function instead of the class, whose attributes lead to Python's insides."""
    return dict(*args, **values)
