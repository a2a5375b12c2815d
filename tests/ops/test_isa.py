"""LINESHAFT_ISA, in processes of their own: an instruction set is chosen once, when the library is first asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from native_cases import NAMES, NEEDS_NATIVE

FORKS = """
import contextlib, io, json, os, sys, traceback
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.ops import isa, table
from lineshaft.sched.request import Ask, Emitted, Sampling

assert not isa._tried, "the imports have chosen already"

def chosen():
    with table.steady():
        print(isa.describe(), "|", " ".join(sorted(set(table.chosen("cpu").values()))))

def answer():
    sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=96, vocab_size=61)
    attention = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Decoder(ModelConfig(family="llama", initializer_range=0.2, attention=attention, **sizes))
    model.initialise(5)
    engine = Engine(model.eval().requires_grad_(False), EngineConfig(page_tokens=4, cache_bytes=2**20), clock=lambda: 0.0)
    engine.submit(Ask([3, 1, 4, 1, 5], Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)))
    told = []
    while not engine.idle:
        told += [event.token for event in engine.step() if isinstance(event, Emitted)]
    print(isa.describe().partition(" of")[0], "|", *told)

def forked(what, name):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["LINESHAFT_ISA"] = name
        said, status = io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(said):
                what()
        except BaseException:
            said, status = io.StringIO(traceback.format_exc()), 1
        os.write(writing, said.getvalue().encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().strip()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

works = {"chosen": chosen, "answer": answer}
print(json.dumps([forked(works[work], name) for work, name in json.loads(sys.argv[1])]))
"""
"""Each work in a fork that has its imports behind it: they are most of the time that a process takes."""
WORKS = [("chosen", "sse1"), ("chosen", "none"), *(("answer", isa) for isa in ("none", *NAMES))]


Ended = dict[tuple[str, str], tuple[int, str]]


@pytest.fixture(scope="module")
def ended() -> Ended:
    """Exit status of each work on each instruction set, and what it said."""
    env = {name: value for name, value in os.environ.items() if name != "LINESHAFT_ISA"}
    done = subprocess.run([sys.executable, "-c", FORKS, json.dumps(WORKS)], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return dict(zip(WORKS, map(tuple, json.loads(done.stdout)), strict=True))


@NEEDS_NATIVE
def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(ended: Ended) -> None:
    status, said = ended["chosen", "sse1"]
    assert status == 1
    assert f"ConfigError: LINESHAFT_ISA=sse1: this processor runs {', '.join(NAMES)}, or none for PyTorch alone" in said


def test_none_leaves_the_table_without_native_kernels(ended: Ended) -> None:
    assert ended["chosen", "none"] == (0, "native kernels are switched off by LINESHAFT_ISA=none | reference steady")


@NEEDS_NATIVE
def test_an_engine_answers_on_every_instruction_set_and_on_none(ended: Ended) -> None:
    answers = {isa: ended["answer", isa] for isa in ("none", *NAMES)}
    assert {status for status, _ in answers.values()} == {0}, answers
    assert all(f"native kernels: {isa} |" in answers[isa][1] for isa in NAMES)
    tokens = {said.partition("| ")[2] for _, said in answers.values()}
    assert len(tokens) == 1, answers
    assert len(tokens.pop().split()) == 6
