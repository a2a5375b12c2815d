"""Sixty conversations: ten kinds of text in four plain forms, with tools and with reasoning; none of them is a golden one."""

from lineshaft.text.golden import Conversation, call, says

WORDS = {
    "english": "Don't panic, it's only 3.14!",
    "chinese": "骑手态度特别好，下次还会再点。",
    "emoji": "👩‍👩‍👧‍👦👍🏽 🇨🇳",
    "accents": "e\u0301 Übergröße naïve Ω",
    "newlines": "\n\nfirst\n\n\nlast\n",
    "spaces": "   wide   \t ",
    "windows": "one\r\ntwo\r\n",
    "code": "for x in y:\n    print(f'{x}')  # {{ x }} {% if %}",
    "markers": "<|im_end|></s><|eot_id|>[/INST]<｜User｜><think>",
    "html": "<b>&amp; \"quoted\" 'too'</b>",
}
OTHER = [*list(WORDS.values())[3:], *list(WORDS.values())[:3]]
"""For each kind another one, to answer with."""
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find_order", "description": "Finds <an> order", "parameters": {"type": "object", "properties": {"号": {}}}},
    }
]


def _plain():
    for (name, text), other in zip(WORDS.items(), OTHER, strict=True):
        ask, answer = says("user", text), says("assistant", other)
        yield f"{name} asked", Conversation([ask], prompt=True)
        yield f"{name} answered", Conversation([ask, answer])
        yield f"{name} with system", Conversation([says("system", other), ask, says("assistant", text)])
        yield f"{name} in turns", Conversation([says("system", text), ask, answer, says("user", other), answer, ask], prompt=True)


def _tools():
    for (name, text), other in zip(WORDS.items(), OTHER, strict=True):
        odd = len(name) % 2
        calls = [call("find_order", {"号": text, "n": number, "deep": [None, True]}, f"call0000{number}") for number in range(1 + odd)]
        results = [says("tool", text, tool_call_id=item["id"], name="find_order") for item in calls]
        turns = [says("user", text), says("assistant", None if odd else other, tool_calls=calls), *results]
        if len(name) > 5:
            turns = [says("system", other), *turns, says("assistant", other)]
        yield f"{name} with tools", Conversation(turns, TOOLS)


def _reasoning():
    for (name, text), other in zip(WORDS.items(), OTHER, strict=True):
        thought = says("assistant", other, reasoning_content=text)
        turns = [says("user", text), thought, says("user", other), thought]
        yield f"{name} thought over", Conversation(turns if len(name) % 2 else turns[:2])


PLAIN = dict(_plain())
CHATS = PLAIN | dict(_tools()) | dict(_reasoning())


def described(chat):
    """All texts in a conversation, for a tokenizer to learn from."""
    return [message["content"] or "" for message in chat.messages]
