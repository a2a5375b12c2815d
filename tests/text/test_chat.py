"""Chat templates: the same text as transformers, and no way out of the sandbox."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lineshaft.base.errors import RequestError
from lineshaft.text.chat import render_chat

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(system='', turns=0) %}
{%- for message in messages if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if ns.turns > 6 %}{% break %}{% endif %}
    {%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}
    {%- else %}{{ '<|Assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}
"""

TOOLS = """\
{{ bos_token }}
{%- macro describe(tool) %}{{ tool | tojson(indent=2) }}{% endmacro %}
{%- if tools %}
    <tools today={{ strftime_now('%Y') }}>
    {% for tool in tools %}
        {{ describe(tool) }}
    {% endfor %}
    </tools>
{% endif %}
{% for message in messages %}
[{{ loop.index0 }}/{{ messages | length }} {{ message.role | upper }}] {{ message.content | tojson }}
{% endfor %}
{{ dict(a=1) | tojson }} {{ messages | map(attribute='role') | unique | join(',') }}
"""

STRICT = """\
{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ message.content }}{% endfor %}"""

TURNS = [
    {"role": "system", "content": "你是客服。<b>&\"'"},
    {"role": "user", "content": "  退货要几天?\n"},
    {"role": "assistant", "content": "七天 😀"},
    {"role": "user", "content": "and {{ 7 * 7 }} & <html>?"},
]
TOOL_LIST = [{"type": "function", "function": {"name": "查询", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}}]


@pytest.mark.parametrize("template", [CHATML, DEEPSEEK, TOOLS], ids=["chatml", "deepseek", "tools"])
@pytest.mark.parametrize("messages", [TURNS, TURNS[1:2], TURNS[:2], TURNS[1:], TURNS * 3], ids=["four", "user", "two", "no_system", "many"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOL_LIST], ids=["no_tools", "tools"])
def test_the_text_is_the_one_transformers_renders(template, messages, prompt, tools):
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, bos_token="<bos>", eos_token="<eos>"
    )
    ours = render_chat(template, messages, bos="<bos>", eos="<eos>", add_generation_prompt=prompt, tools=tools)
    assert ours == theirs[0]
    assert messages[-1]["content"].strip() in ours or template is TOOLS or len(messages) > 6


def render(template, messages=TURNS):
    return render_chat(template, messages, bos="", eos="", add_generation_prompt=True)


def test_a_refusal_by_the_template_is_the_users_error_and_says_why():
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render(STRICT)
    assert caught.value.param == "messages"


def test_what_a_user_writes_is_never_run_as_template():
    assert "{{ 7 * 7 }}" in render(CHATML)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ dict.__subclasses__() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ ('%s' | format(messages)).__class__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns.x }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='user') }}",
        "{{ messages[0].clear() }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_reach_python_or_change_the_messages(attack):
    messages = [dict(message) for message in TURNS]
    try:
        seen = render(attack, messages)
    except RequestError:
        seen = ""
    assert seen == ""  # Jinja prints nothing for what its sandbox hides, and refuses any use of it
    assert messages == TURNS


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages[0].no.more }}", "{{ 1 / 0 }}", "{{ messages + 3 }}", "{{ nothing() }}"])
def test_a_broken_template_is_a_request_error_and_no_traceback(template):
    with pytest.raises(RequestError, match="chat template"):
        render(template)


def test_a_template_that_never_ends_its_recursion_is_a_request_error():
    with pytest.raises(RequestError, match="chat template"):
        render("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}")
