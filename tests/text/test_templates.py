"""The bundled templates: ids and loss masks equal those of transformers, and what is marked is what the assistant said."""

import json
import re

import jinja2
import pytest
from conversations import CHATS, PLAIN
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.base.errors import RequestError
from lineshaft.text.bundled import BUNDLED, source
from lineshaft.text.chat import render_marked, spoken_tokens
from lineshaft.text.golden import CONVERSATIONS, Conversation, says
from lineshaft.text.tokenizer import Tokenizer

NAMES = sorted(BUNDLED)
ALL = CHATS | {f"golden {name}": chat for name, chat in CONVERSATIONS.items()}
ANYTHING = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)


def rendered(tokenizer, chat):
    return render_marked(
        tokenizer.chat_template, chat.messages, bos=tokenizer.bos, eos=tokenizer.eos, add_generation_prompt=chat.prompt, tools=chat.tools
    )


def encoded(tokenizer, chat):
    """Ids and loss mask; None when the template refuses."""
    try:
        result = rendered(tokenizer, chat)
    except RequestError:
        return None
    ids, offsets = tokenizer.encode_placed(result.text)
    mask = [0] * len(ids)
    for first, stop in spoken_tokens(result.spoken, offsets):
        mask[first:stop] = [1] * (stop - first)
    return ids, mask


def in_transformers(tokenizer, chat):
    try:
        both = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, add_generation_prompt=chat.prompt, return_dict=True, return_assistant_tokens_mask=True
        )
    except jinja2.TemplateError:
        return None
    return both["input_ids"], both["assistant_masks"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_loss_mask_of_every_conversation_are_those_of_transformers(name, ours, theirs):
    different = [title for title, chat in ALL.items() if encoded(ours[name], chat) != in_transformers(theirs[name], chat)]
    assert different == []
    taken = [title for title, chat in CHATS.items() if encoded(ours[name], chat) is not None]
    assert len(taken) == (40 if name == "plain" else 60)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_of_a_template_is_cut_up(name, ours, folders):
    tokens = BUNDLED[name].tokens
    assert len(set(tokens)) == len(tokens)
    assert [len(ours[name].encode_templated(token)) for token in tokens] == [1] * len(tokens)
    assert ours[name].encode_templated(BUNDLED[name].bos + BUNDLED[name].eos) == [ours[name].bos_id, ours[name].eos_id] == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_token_that_a_template_writes_is_declared(name):
    written = set(re.findall(r"<[|｜][^|｜]+[|｜]>|</?\w+>(?= |\\n|'|$)|\[/?[A-Z_]{3,}\]", source(name)))
    assert written - {"<tools>", "</tools>"} <= set(BUNDLED[name].tokens)


@pytest.mark.parametrize("name", NAMES)
def test_what_readers_see_of_an_answer_are_the_visible_tokens(name, ours):
    tokens = BUNDLED[name]
    ids = ours[name].encode_templated("".join(tokens.tokens))
    assert ours[name].decode(ids) == "".join(tokens.visible)


def mask_by_bytes(tokenizer, ids, text, spans):
    """The loss mask worked out from the bytes of the tokens alone."""
    bounds = [(len(text[:first].encode()), len(text[:stop].encode())) for first, stop in spans]
    table, mask, place = tokenizer.token_bytes(), [], 0
    for number in ids:
        size = len(table[number] or tokenizer.token_text(number).encode())
        mask.append(int(any(first < place + size and place < stop for first, stop in bounds)))
        place += size
    assert place == len(text.encode())
    return mask


@given(st.sampled_from(NAMES), st.lists(ANYTHING, min_size=2, max_size=5), st.booleans())
def test_the_mask_is_what_the_bytes_of_the_tokens_say(ours, name, texts, prompt):
    chat = Conversation([says(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)], prompt=prompt)
    result = rendered(ours[name], chat)
    ids, mask = encoded(ours[name], chat)
    assert mask == mask_by_bytes(ours[name], ids, result.text, result.spoken)
    said = "".join(result.text[first:stop] for first, stop in result.spoken)
    answers = [text.strip() if name == "llama3" else text for text in texts[1::2]]
    assert said == "".join(answer + ours[name].eos for answer in answers)


@given(st.lists(ANYTHING, min_size=1, max_size=6))
def test_characters_cut_into_several_tokens_are_marked_whole(ours, texts):
    """Here nothing follows the assistant's last character, which is where transformers loses the later bytes of it."""
    template = "{% for text in messages %}a{% generation %}{{ text.content }}{% endgeneration %}{% endfor %}"
    result = render_marked(template, [says("assistant", text) for text in texts], bos="", eos="")
    ids, offsets = ours["plain"].encode_placed(result.text)
    marked = {place for first, stop in spoken_tokens(result.spoken, offsets) for place in range(first, stop)}
    assert [int(place in marked) for place in range(len(ids))] == mask_by_bytes(ours["plain"], ids, result.text, result.spoken)


@pytest.mark.parametrize(
    ("template", "spoken"),
    [
        ("a{% generation %}bc{% endgeneration %}d", [(1, 3)]),
        ("{% for i in [1, 2] %}a{%- generation -%} b {%- endgeneration -%} {% endfor %}", [(1, 2), (3, 4)]),
        ("{% if true %}a{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}", []),
        ("no marks", []),
        ("{% macro m() %}x{% generation %}y{% endgeneration %}{% endmacro %}ab{{ m() }}", None),
        ("{% set s %}{% generation %}y{% endgeneration %}{% endset %}ab{{ s }}", None),
        ("ab{% filter upper %}{% generation %}y{% endgeneration %}{% endfilter %}", None),
    ],
)
def test_marks_have_a_place_where_it_can_be_known(template, spoken):
    assert render_marked(template, [], bos="", eos="").spoken == spoken


@pytest.mark.parametrize("name", ["chatml", "deepseek"])
def test_thoughts_of_earlier_turns_are_left_out(name, ours):
    text = rendered(ours[name], CONVERSATIONS["reasoning turns"]).text
    assert "51 + 1" in text and "Ten threes" not in text


def test_chatml_looks_like_chatml(ours):
    assert rendered(ours["chatml"], CONVERSATIONS["system question"]).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\n"
    )
    called = rendered(ours["chatml"], CONVERSATIONS["tool call"])
    (first, stop), _ = called.spoken
    assert called.text[first:stop] == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京", "days": 1}}\n</tool_call><|im_end|>'
    )
    assert '<|im_start|>user\n<tool_response>\n{"celsius": 31, "sky": "晴"}\n</tool_response><|im_end|>\n' in called.text
    two = rendered(ours["chatml"], CONVERSATIONS["tool calls"]).text
    assert "</tool_response>\n<tool_response>\n已发货\n</tool_response><|im_end|>\n<|im_start|>assistant\n" in two


def test_the_others_look_like_their_families(ours):
    texts = {name: rendered(ours[name], CONVERSATIONS["system"]).text for name in NAMES}
    asked, answer = "What is a list?", "A list holds values in order."
    assert texts["plain"] == f"<|bos|>Be brief.\n\nUser: {asked}\n\nAssistant: {answer}<|eos|>\n\n"
    assert texts["mistral"] == f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]{asked}[/INST]{answer}</s>"
    assert texts["deepseek"] == f"<｜begin▁of▁sentence｜>Be brief.<｜User｜>{asked}<｜Assistant｜>{answer}<｜end▁of▁sentence｜>"
    parts = {"system": "Be brief.", "user": asked, "assistant": answer}
    headed = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in parts.items())
    assert texts["llama3"] == f"<|begin_of_text|>{headed}"


def test_the_plain_template_refuses_what_it_has_no_form_for(ours):
    for name in ("tools", "tool call", "reasoning"):
        with pytest.raises(RequestError, match=r"the plain template has no form for .*: choose another chat template"):
            rendered(ours["plain"], CONVERSATIONS[name])
    assert set(PLAIN) <= set(CHATS) and len(PLAIN) == 40


@pytest.mark.parametrize("spaces", ["  ", "\n", " \t "])
def test_a_tokenizer_that_trims_places_still_marks_every_space(spaces, folders):
    described = json.loads((folders["chatml"] / "tokenizer.json").read_text())
    described["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    trimming = Tokenizer(json.dumps(described))
    template = "{% for m in messages %}.{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    result = render_marked(template, [says("assistant", text) for text in (spaces, f"a{spaces}", f"{spaces}a")], bos="", eos="")
    ids, offsets = trimming.encode_placed(result.text)
    marked = {place for first, stop in spoken_tokens(result.spoken, offsets) for place in range(first, stop)}
    assert [int(place in marked) for place in range(len(ids))] == mask_by_bytes(trimming, ids, result.text, result.spoken)
