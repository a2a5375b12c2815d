"""/v1/embeddings, /tokenize, /detokenize and /version."""

import importlib.metadata
import threading

import openai
import pytest
from fake_engine import CONTEXT_TOKENS, FakeEngine, embedding, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from world import MODEL, serving, until

from lineshaft.serve.limits import Limits
from lineshaft.serve.service import EMBEDDED_AT_ONCE


def ids_of(text):
    return [tokenizer().bos_id, *tokenizer().encode(text)]


# -- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "base64"])
def test_texts_are_embedded_in_their_order(world, form):
    texts = [f"text {number}" for number in range(40)]
    answer = world.client().embeddings.create(model=MODEL, input=texts, encoding_format=form)
    if form == "float":
        assert [item.embedding for item in answer.data] == [embedding(ids_of(text)) for text in texts]
    assert [item.index for item in answer.data] == list(range(40))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(ids_of(text)) for text in texts)
    assert world.engine.submitted[-1].ask.task == "embed"


def test_the_official_client_decodes_base64_by_itself_to_the_same_numbers(world):
    answer = world.client().embeddings.create(model=MODEL, input="hello")  # asks for base64 where it is not told what to ask for
    assert answer.data[0].embedding == pytest.approx(embedding(ids_of("hello")), rel=1e-6)


@pytest.mark.parametrize("given", ["hello", ["hello"], ids_of("hello"), [ids_of("hello")]], ids=["text", "texts", "ids", "lists"])
def test_an_input_may_be_a_text_or_ids_alone_or_in_a_list(world, given):
    answer = world.client().embeddings.create(model=MODEL, input=given, encoding_format="float", dimensions=3)
    assert [item.embedding for item in answer.data] == [embedding(ids_of("hello"))]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", ""), ("input", []), ("input", ["a", 1]), ("input", [10_000]), ("input", "a b " * CONTEXT_TOKENS), ("input", None),
        ("encoding_format", "hex"), ("dimensions", 2), ("dimensions", 0), ("stream", True),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_by_its_name(world, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        world.client().embeddings.create(model=MODEL, input="x", extra_body={field: value})
    assert caught.value.body["param"] == field


def test_too_many_texts_are_refused():
    with serving(FakeEngine(), limits=Limits(max_inputs=2)) as world, pytest.raises(openai.BadRequestError, match="3 texts"):
        world.client().embeddings.create(model=MODEL, input=["a", "b", "c"])


def test_one_client_with_many_texts_leaves_room_for_others():
    with serving(FakeEngine(gate=threading.Semaphore(0)), max_waiting=EMBEDDED_AT_ONCE + 4) as world:
        many = threading.Thread(target=world.post, args=("/v1/embeddings", {"model": MODEL, "input": ["a"] * 200}))
        many.start()
        until(lambda: world.worker.in_flight == EMBEDDED_AT_ONCE)
        world.engine.gate.release(10_000)
        assert world.client().completions.create(model=MODEL, prompt="x").choices
        many.join(20)
        assert not many.is_alive()
        assert not world.worker.in_flight


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_a_text_is_tokenized_as_a_completions_prompt_is(world):
    status, _, answer = world.post("/tokenize", {"model": MODEL, "prompt": "hello 价格", "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == ids_of("hello 价格")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), CONTEXT_TOKENS)
    assert answer["token_strs"][0] == "<bos>" and len(answer["token_strs"]) == answer["count"]


def test_special_tokens_can_be_left_out_and_the_model_need_not_be_named(world):
    _, _, answer = world.post("/tokenize", {"prompt": "hello", "add_special_tokens": False})
    assert answer == {"count": len(ids_of("hello")) - 1, "max_model_len": CONTEXT_TOKENS, "tokens": ids_of("hello")[1:], "token_strs": None}


def test_a_conversation_is_tokenized_as_the_model_reads_it(world):
    messages = [{"role": "user", "content": "hello"}]
    _, _, answer = world.post("/tokenize", {"messages": messages})
    world.client().chat.completions.create(model=MODEL, messages=messages)
    assert answer["tokens"] == world.engine.submitted[-1].prompt
    _, _, bare = world.post("/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert answer["tokens"][: bare["count"]] == bare["tokens"] and bare["count"] < answer["count"]


@settings(max_examples=50)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_detokenize_is_the_way_back_special_tokens_and_all(world, text):
    _, _, there = world.post("/tokenize", {"prompt": text})
    _, _, back = world.post("/detokenize", {"tokens": there["tokens"]})
    assert back == {"prompt": "<bos>" + text}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400), ("/tokenize", {"prompt": 3}, 400), ("/tokenize", {"prompt": "x", "messages": []}, 400),
        ("/tokenize", {"prompt": "x", "model": "gpt-4"}, 404), ("/detokenize", {}, 400), ("/detokenize", {"tokens": [10_000]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400), ("/detokenize", {"tokens": [1], "model": "gpt-4"}, 404),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized_is_refused(world, path, body, status):
    assert world.post(path, body)[0] == status


def test_the_version_is_told(world):
    assert world.call("GET", "/version")[2] == {"version": importlib.metadata.version("lineshaft")}
