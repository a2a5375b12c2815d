"""LINESHAFT_ISA, in processes of their own: an instruction set is chosen once, when the library is first asked for."""

from __future__ import annotations

import os
import subprocess
import sys

from native_cases import NAMES, NEEDS_NATIVE

CHOSEN = """
from lineshaft.ops import isa, table
with table.steady():
    print(isa.describe(), "|", " ".join(sorted(set(table.chosen("cpu").values()))))
"""
ANSWER = """
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.ops.isa import describe
from lineshaft.sched.request import Ask, Emitted, Sampling

sizes = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=96, vocab_size=61)
attention = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
model = Decoder(ModelConfig(family="llama", initializer_range=0.2, attention=attention, **sizes))
model.initialise(5)
engine = Engine(model.eval().requires_grad_(False), EngineConfig(page_tokens=4, cache_bytes=2**20), clock=lambda: 0.0)
engine.submit(Ask([3, 1, 4, 1, 5], Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)))
told = []
while not engine.idle:
    told += [event.token for event in engine.step() if isinstance(event, Emitted)]
print(describe().partition(" of")[0], "|", *told)
"""


def python(program: str, isa: str) -> tuple[int, str]:
    env = {**os.environ, "LINESHAFT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout.strip() if done.returncode == 0 else done.stderr


@NEEDS_NATIVE
def test_an_unknown_instruction_set_is_an_error_that_names_the_choices() -> None:
    status, said = python(CHOSEN, "sse1")
    assert status == 1
    assert f"ConfigError: LINESHAFT_ISA=sse1: this processor runs {', '.join(NAMES)}, or none for PyTorch alone" in said


def test_none_leaves_the_table_without_native_kernels() -> None:
    assert python(CHOSEN, "none") == (0, "native kernels are switched off by LINESHAFT_ISA=none | reference steady")


@NEEDS_NATIVE
def test_an_engine_answers_on_every_instruction_set_and_on_none() -> None:
    answers = {isa: python(ANSWER, isa) for isa in ("none", *NAMES)}
    assert {status for status, _ in answers.values()} == {0}, answers
    assert all(f"native kernels: {isa} |" in answers[isa][1] for isa in NAMES)
    tokens = {said.partition("| ")[2] for _, said in answers.values()}
    assert len(tokens) == 1, answers
    assert len(tokens.pop().split()) == 6
