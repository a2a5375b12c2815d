"""The offline API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lineshaft.base.errors import BadCheckpoint, ModelError, RequestError, TooLong
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.llm import LLM
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.sched.admission import SchedulerConfig
from lineshaft.sched.request import Sampling

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are the letters, with a begin and an end token."""
    words = tmp_path_factory.mktemp("words")
    letters = {"<s>": 0, "</s>": 1, **{chr(ord("A") + place): place + 2 for place in range(58)}}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(words / "tokenizer.json"))
    (words / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    here = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(tiny("qwen3", vocab_size=60, bos_token_id=0, eos_token_ids=[1]), here, words)
    return here


def test_answers_come_in_the_order_of_the_prompts_though_more_than_may_wait(folder: Path) -> None:
    prompts = ["Hello"[: 1 + number % 5] * (1 + number % 3) for number in range(23)]
    crowd = LLM(folder, EngineConfig(scheduler=SchedulerConfig(max_waiting=2, max_batch=3, step_tokens=5)))
    one = LLM(folder)
    assert crowd.generate(prompts, GREEDY) == [one.generate([prompt], GREEDY)[0] for prompt in prompts]


def test_text_begins_with_the_bos_token_and_ids_are_taken_as_they_are(folder: Path) -> None:
    llm = LLM(folder)
    text, ids, bare = llm.generate(["Shaft", [0, *llm.tokenizer.encode("Shaft")], llm.tokenizer.encode("Shaft")], GREEDY)
    assert text == ids != bare


def test_the_end_token_ends_the_answer_and_is_no_text(folder: Path) -> None:
    llm = LLM(folder)
    whole = llm.generate(["Oil"], GREEDY)[0]
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 8)
    assert whole.text == llm.tokenizer.decode(whole.token_ids)
    last = whole.token_ids[4]
    cut = llm.generate(["Oil"], GREEDY.model_copy(update={"stop_token_ids": [last]}))[0]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(last) + 1]
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1])


def test_no_prompts_give_no_answers(folder: Path) -> None:
    assert LLM(folder).generate([]) == []


def test_after_a_refused_prompt_the_next_call_is_undisturbed(folder: Path) -> None:
    llm = LLM(folder)
    with pytest.raises(TooLong):
        llm.generate(["fine", "x" * 200, "fine"], GREEDY)
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", []], GREEDY)
    assert llm.engine.idle
    assert llm.generate(["fine"], GREEDY) == LLM(folder).generate(["fine"], GREEDY)


def test_a_dtype_may_be_asked_for(folder: Path) -> None:
    llm = LLM(folder, EngineConfig(dtype="bfloat16"))
    assert llm.engine.cache.dtype == torch.bfloat16
    assert len(llm.generate(["Shaft"], GREEDY)[0].token_ids) in range(1, 9)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint):
        LLM(tmp_path)


def test_a_model_without_numbers_is_told_and_the_next_call_is_answered(folder: Path) -> None:
    llm = LLM(folder, EngineConfig())
    weight = llm.engine.model.model.embed_tokens.weight
    whole = weight[3].clone()
    with torch.inference_mode():
        weight[3] = float("nan")
        with pytest.raises(ModelError, match="logits are not numbers"):
            llm.generate([[2, 3], [4]], GREEDY)
        weight[3] = whole
    assert llm.engine.idle
    assert len(llm.generate([[4]], GREEDY)[0].token_ids) == 8
