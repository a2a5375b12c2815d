"""A real, tiny checkpoint behind the real engine: over HTTP, as a stage, and when the parent dies."""

import asyncio
import json
import subprocess
import sys

import aiohttp
import pytest
from tiny_checkpoint import write_checkpoint, write_tokenizer

from lineshaft.base.errors import EngineError
from lineshaft.base.store import Store
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.llm import LLM
from lineshaft.records.exchange import read_exchanges
from lineshaft.sched.request import Sampling
from lineshaft.serve.ask import ANSWER, AnswerConfig, _server
from lineshaft.serve.orders import Orders
from lineshaft.serve.server import ServeConfig

PROMPT = "the price 价格"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def checkpoint(store, tmp_path_factory):
    """A Llama of two layers with random weights and the tests' tokenizer."""
    words = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(words)
    with store.draft("checkpoint", stage="by_hand", version=1, config={}) as draft:
        write_checkpoint(draft.root, words)
    return next(store.open(item.id) for item in store.all() if item.kind == "checkpoint")


def _letters(text):
    return "".join(letter for letter in text if letter.isalnum())


ASK = AnswerConfig(prompt=PROMPT, max_tokens=24, temperature=1.0, seed=7, top_p=0.9)


def test_the_stage_records_the_answer_that_the_offline_api_gives(store, checkpoint, capfd):
    traffic = ANSWER(store, ASK, checkpoint=checkpoint)
    ((exchange, timing),) = read_exchanges(traffic)
    answer = LLM(checkpoint.root).generate([PROMPT], Sampling(max_tokens=24, temperature=1.0, seed=7, top_p=0.9))[0]
    assert (exchange.answer, exchange.finish_reason) == (answer.text, answer.finish_reason)
    assert exchange.completion_tokens == len(answer.token_ids)
    assert exchange.model == checkpoint.id
    assert 0 < timing.first_token_seconds <= timing.seconds
    assert timing.ready_seconds > 0
    told = capfd.readouterr()
    assert _letters(answer.text) in _letters(told.err) and "ready in" in told.err
    assert "\x1b" not in told.err
    assert PROMPT not in told.err
    assert told.out == ""


def test_the_same_question_gives_the_same_bytes(store, checkpoint, tmp_path):
    digests = [[item.sha256 for item in ANSWER(root, ASK, checkpoint=checkpoint).manifest.files] for root in (store, Store(tmp_path))]
    assert digests[0] == digests[1]


def test_a_checkpoint_that_cannot_be_served_fails_the_stage_in_words(store, make, tmp_path, capfd):
    broken = make(Store(tmp_path), {"config.json": b"{}"}, kind="checkpoint")
    with pytest.raises(EngineError, match="ended with status 5 before it was ready"):
        ANSWER(Store(tmp_path), AnswerConfig(prompt="x"), checkpoint=broken)
    assert "error: " in capfd.readouterr().err
    assert not list((tmp_path / "artifacts").glob("traffic-*"))


def test_a_server_whose_parent_is_killed_ends_by_itself(checkpoint):
    orders = Orders(folder=str(checkpoint.root), name="x", serve=ServeConfig(port=0), engine=EngineConfig()).model_dump_json()
    parent = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'lineshaft.serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        f"child.stdin.write({orders!r} + chr(10))\n"
        "child.stdin.flush()\n"
        "print(child.stdout.readline(), flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "port" in process.stdout.readline()
        process.kill()
        told = process.stderr.read()  # comes back when nobody holds the pipe any more: not the parent, not its server
    assert "listening" in told and "Traceback" not in told


def test_twenty_streams_at_once_are_each_what_they_are_alone(checkpoint, tmp_path):
    prompts = [PROMPT[: 1 + number % len(PROMPT)] for number in range(20)]
    alone = LLM(checkpoint.root)
    wanted = [alone.generate([prompt], Sampling(max_tokens=16, temperature=0.0))[0].text for prompt in prompts]
    assert asyncio.run(_streams(checkpoint, prompts)) == wanted


async def _streams(checkpoint, prompts):
    orders = Orders(folder=str(checkpoint.root), name="x", serve=ServeConfig(port=0), engine=EngineConfig())
    async with _server(orders, 60) as (url, _), aiohttp.ClientSession() as session:
        return await asyncio.gather(*(_stream(session, url, prompt) for prompt in prompts))


async def _stream(session, url, prompt):
    body = {"model": "x", "prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": True}
    text = ""
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        async for line in answer.content:
            if line.startswith(b"data: {"):
                text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
    return text
