"""A thousand bodies that nobody would send on purpose do no harm."""

import asyncio
import json
import random
from collections import Counter

import aiohttp
import msgspec
import pytest
from fake_engine import TEXT
from world import MODEL

from lineshaft.serve.replies import ErrorAnswer

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize")
VALID = {
    "/v1/completions": {"model": MODEL, "prompt": ["hello 价格 😀", "b"], "max_tokens": 3, "logit_bias": {"5": 1.5}, "stop": ["a", "b"]},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 3},
    "/v1/embeddings": {"model": MODEL, "input": ["a", "b"], "encoding_format": "base64"},
    "/tokenize": {"model": MODEL, "prompt": "hello", "return_token_strs": True},
    "/detokenize": {"model": MODEL, "tokens": [1, 2, 3]},
}
SPLICED = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e-999", b"9" * 400, b"-" + b"9" * 5000, b"0.1" + b"0" * 5000 + b"1", b'"\\ud800"',
    b'"\\udc00\\ud800"', b'"\\u0000"', b"\x00", b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"[" * 3000, b'{"a":' * 3000, b"[[[[]]]]",
    b"true", b"null", b'""', b"{}", b"[]", b'"' + "😀".encode() * 2000 + b'"', b'{"model": 1, "model": 2}', b"\xef\xbb\xbf", b"//", b"'x'",
]  # fmt: skip


def mutated(chance, body):
    """The body with some of its bytes cut out, doubled, changed, or replaced by something odd."""
    for _ in range(chance.randint(1, 3)):
        place, size = chance.randrange(len(body) + 1), chance.randint(0, 12)
        middle = chance.choice(
            [b"", body[place : place + size] * 2, chance.randbytes(size), chance.choice(SPLICED), chance.choice(SPLICED)]
        )
        body = body[:place] + middle + body[place + chance.choice([0, size]) :]
    return body


def odd_value(chance, path):
    """The body with one value replaced by something that is valid JSON as a rule, or sent twice."""
    table = {key: json.dumps(value).encode() for key, value in VALID[path].items()}
    name = chance.choice(
        [*table, "n", "seed", "temperature", "max_tokens", "logprobs", "stop_token_ids", "priority", "dimensions", "\ud800"]
    )
    pairs = [*table.items(), (name, chance.choice(SPLICED))]
    chance.shuffle(pairs)
    return b"{" + b",".join(json.dumps(key).encode() + b":" + value for key, value in pairs) + b"}"


def bodies(count):
    chance = random.Random(20261126)
    for number in range(count):
        path = PATHS[number % len(PATHS)]
        valid = json.dumps(VALID[path], ensure_ascii=chance.random() < 0.5).encode()
        yield path, broken(chance, path, valid, number // len(PATHS) % 4)


def broken(chance, path, valid, kind):
    if kind == 0:
        return chance.randbytes(chance.choice([0, 1, 7, 60, 3000]))
    if kind == 1:
        return valid[: chance.randrange(len(valid))]
    return mutated(chance, valid) if kind == 2 else odd_value(chance, path)


@pytest.mark.parametrize("path", PATHS)
def test_the_bodies_that_are_broken_below_are_right_before(world, path):
    assert world.post(path, VALID[path])[0] == 200


def test_a_thousand_broken_bodies_get_a_refusal_and_the_next_request_an_answer(world):
    statuses = asyncio.run(sent(world, list(bodies(1000))))
    assert set(statuses) == {200, 400, 404}
    assert statuses.total() == 1000
    assert statuses[400] > 700
    assert world.worker.state == "ready"
    assert not world.worker.in_flight
    assert world.client().completions.create(model=MODEL, prompt="hello", max_tokens=64).choices[0].text == TEXT


async def sent(world, requests):
    statuses = Counter()
    turns = asyncio.Semaphore(8)

    async def one(session, path, body):
        async with turns, session.post(world.url + path, data=body) as answer:
            told = await answer.read()
            if answer.status != 200:
                assert answer.status in (400, 404), (answer.status, body[:200])
                msgspec.json.decode(told, type=ErrorAnswer)
                assert len(told) < 2000, body[:200]
            statuses[answer.status] += 1

    async with aiohttp.ClientSession(headers={"content-type": "application/json"}, timeout=aiohttp.ClientTimeout(total=60)) as session:
        await asyncio.gather(*(one(session, path, body) for path, body in requests))
    return statuses
