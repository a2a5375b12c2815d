"""The golden conversations and texts: what a tokenizer and a chat template are held to.

They hold what goes wrong in practice: spaces and newlines at the edges of a message, turns without an answer, tools,
reasoning, Chinese, emoji of several code points, and text that looks like a special token. Whoever changes anything here
raises `SET`, since artifacts hold the tokens of the set they were made with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

SET = 1
"""Number of this set of conversations and texts."""

NOW = datetime(2025, 1, 15, 12, 30)
"""The time that templates are told, a Wednesday: one that writes today's date would otherwise break its own promise tomorrow."""

TEXTS = {
    "english": "The quick brown fox doesn't jump over 12,345 lazy dogs; it walks (slowly).",
    "chinese": "退货要几天？七天以内，运费由我们承担。",
    "mixed": "GPU 显存 80GB，约 ¥120,000；naïve café, Übergröße, Привет, שלום, こんにちは",
    "emoji": "👍🏽 👩‍👩‍👧‍👦 🇨🇳 e\u0301 is not \u00e9",
    "spaces": "  two before, three after   \n\n\n\ttab\r\nline\u00a0\u3000end \n",
    "code": "def f(x: int) -> str:\n    return f'{x:>8}'  # <b>&amp;</b>\n",
    "numbers": "0 1 12 123 1234 12345 3.14159 -7e-10 0x1F",
    "markers": "<s></s><|im_end|><|eot_id|>[INST]<think>",
}
"""Plain texts, for the tokenizer alone."""


@dataclass(frozen=True)
class Conversation:
    """What a template is given."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt: bool = False
    """Ends where the assistant begins, as for serving; otherwise it is whole, as for training."""


@dataclass(frozen=True)
class _Tool:
    name: str
    described: str
    parameters: dict[str, str] = field(default_factory=dict)

    def schema(self) -> dict[str, Any]:
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.described, "parameters": parameters}}


TOOLS = [
    _Tool("get_weather", "Weather of a city & its <alerts>", {"city": "string", "days": "integer"}).schema(),
    _Tool("查询订单", "按编号查询订单").schema(),
]


def says(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content} | more


def call(name: str, arguments: dict[str, Any], number: str) -> dict[str, Any]:
    """A tool call as the assistant's message holds it."""
    return {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}


_ASKED = [says("user", "What is a list?")]
_ANSWERED = [*_ASKED, says("assistant", "A list holds values in order.")]
_BRIEF = says("system", "Be brief.")
_WEATHER = says("user", "Is it warm in 北京 tomorrow?")
_CALLED = says("assistant", None, tool_calls=[call("get_weather", {"city": "北京", "days": 1}, "call00001")])
_RESULT = says("tool", '{"celsius": 31, "sky": "晴"}', tool_call_id="call00001", name="get_weather")

CONVERSATIONS = {
    "question": Conversation(_ASKED, prompt=True),
    "answer": Conversation(_ANSWERED),
    "system": Conversation([_BRIEF, *_ANSWERED]),
    "system question": Conversation([_BRIEF, *_ASKED], prompt=True),
    "two systems": Conversation([_BRIEF, says("system", "今天是周三。"), *_ASKED], prompt=True),
    "turns": Conversation([*_ANSWERED, says("user", "And a tuple?"), says("assistant", "The same, but fixed.")]),
    "turns question": Conversation([_BRIEF, *_ANSWERED, says("user", "And a tuple?")], prompt=True),
    "chinese": Conversation(
        [says("system", "你是客服，请礼貌回答。"), says("user", "退货要几天？"), says("assistant", "七天以内都可以退货。")]
    ),
    "emoji": Conversation([says("user", "👩‍👩‍👧‍👦 or 👍🏽?"), says("assistant", "🇨🇳 e\u0301 👍🏽")]),
    "edges": Conversation(
        [says("system", "\n Be kind. \n"), says("user", "  two spaces, a newline\n"), says("assistant", "\n\n  So it is. \n\n")]
    ),
    "empty": Conversation([says("user", ""), says("assistant", ""), says("user", " ")], prompt=True),
    "markup": Conversation(
        [says("user", "<|im_end|>\n</s> {{ 7 * 7 }} <b>&amp;</b>\r\n```py\nx = 1\n```"), says("assistant", "`x` is\n\n1.")]
    ),
    "tools": Conversation([_BRIEF, _WEATHER], tools=TOOLS, prompt=True),
    "tool call": Conversation([_WEATHER, _CALLED, _RESULT, says("assistant", "Yes, 31 °C.")], tools=TOOLS),
    "tool calls": Conversation(
        [
            says("user", "北京 and order 7?"),
            says("assistant", "I look.", tool_calls=[*_CALLED["tool_calls"], call("查询订单", {}, "call00002")]),
            _RESULT,
            says("tool", "已发货", tool_call_id="call00002", name="查询订单"),
        ],
        tools=TOOLS,
        prompt=True,
    ),
    "reasoning": Conversation([says("user", "17 * 3?"), says("assistant", "51", reasoning_content="17 * 3\n= 51 ✓")]),
    "reasoning turns": Conversation(
        [
            says("user", "17 * 3?"),
            says("assistant", "51", reasoning_content="Ten threes, seven threes."),
            says("user", "再加一？"),
            says("assistant", "52", reasoning_content="51 + 1"),
        ]
    ),
}
"""By name, in the order in which they are checked."""
