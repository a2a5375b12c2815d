"""`engine.cache_dtype=int8`: half the bytes, nearly the same answers, and a refusal where nothing could read such pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lineshaft.base.errors import ConfigError
from lineshaft.engine.cache import page_bytes
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.engine.pool import pool_of
from lineshaft.engine.preflight import Serving, check_room, serve_memory
from lineshaft.engine.warm import warm_up
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, LatentAttention
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import Stored
from lineshaft.ops.isa import FORCE, library
from lineshaft.sched.request import Ask, Emitted, PromptScored, Sampling
from lineshaft.serve.loading import loaded

Tiny = Callable[..., Decoder]
NEEDS_NATIVE = pytest.mark.skipif(library() is None, reason="no native kernels here")
INT8 = EngineConfig(cache_dtype="int8", cache_bytes=4 << 20)
AUTO = EngineConfig(cache_bytes=4 << 20)
HEADS = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=66)
LATENTS = LatentAttention(num_attention_heads=2, q_lora_rank=12, kv_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
"""Of two groups that share a scale, the second one shorter."""


def wide(tiny: Tiny, family: str) -> Decoder:
    return tiny(family, attention=LATENTS if family == "deepseek_v3" else HEADS)


# -- what it costs -------------------------------------------------------------------------------------------------


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_bytes_are_told_as_they_are(tiny: Tiny, family: str, dtype: str) -> None:
    model = wide(tiny, family).to(getattr(torch, dtype))
    config = INT8.model_copy(update={"page_tokens": 4, "cache_bytes": 90_000})
    engine, pool = Engine(model, config), pool_of(model.config, config, getattr(torch, dtype))
    parts = [part for parts in engine.cache.parts for part in parts]
    assert {part.dtype for part in parts} == {torch.uint8}
    assert (
        sum(part.nbytes for part in parts)
        == pool.size
        == serve_memory(Serving(model.config, Stored(dtype), config)).phases["running"]["cache pages"]
    )
    assert engine.cache.pages == pool.pages
    a_token = 2 * 2 * 2 * 70 if family == "llama" else 2 * (112 + 4)  # layers, keys and values, heads, bytes
    assert page_bytes(model.config, 1, torch.int8) == a_token
    assert page_bytes(model.config, 4, torch.int8) * (sum(pool.pages) + len(pool.pages)) == pool.size * len(pool.pages)


@NEEDS_NATIVE
def test_the_same_memory_holds_nearly_twice_the_context(tiny: Tiny) -> None:
    model = tiny("qwen3", attention=HEADS.model_copy(update={"head_dim": 64}), max_position_embeddings=4096).to(torch.bfloat16)
    size = {"cache_bytes": 1 << 20}
    plain, coded = (pool_of(model.config, config.model_copy(update=size), torch.bfloat16).context_tokens for config in (AUTO, INT8))
    assert coded / plain == pytest.approx(128 / 66, rel=0.03)


@NEEDS_NATIVE
def test_the_server_is_told(tiny: Tiny, tmp_path: Path) -> None:
    model = wide(tiny, "llama")
    save_checkpoint(model, tmp_path, tmp_path)
    _, ready = loaded(tmp_path, INT8)
    assert ready.kv_bytes_per_token == 2 * 2 * 2 * 70
    assert "cache pages hold 8-bit codes with scales: 560 bytes a token (as bfloat16: 1056)" in ready.told
    _, ready = loaded(tmp_path, AUTO)
    assert ready.kv_bytes_per_token == 2 * 2 * 2 * 66 * 4
    assert not any("8-bit" in line for line in ready.told)


# -- what is lost --------------------------------------------------------------------------------------------------


def texts_of(model: Decoder, count: int) -> list[list[int]]:
    """The model's own: of these it is as sure as it can be, so that what it forgets shows."""
    engine, luck = Engine(model, AUTO), torch.Generator().manual_seed(1)
    made = {}
    for seed in range(count):
        prompt = torch.randint(61, (4,), generator=luck).tolist()
        (number,) = engine.submit(Ask(prompt, Sampling(max_tokens=86, seed=seed, ignore_eos=True)))
        made[number] = prompt
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, Emitted):
                made[event.request].append(event.token)
    return list(made.values())


def losses(model: Decoder, texts: list[list[int]], config: EngineConfig) -> torch.Tensor:
    """Nats of every token but the first ones."""
    engine = Engine(model, config)
    for text in texts:
        engine.submit(Ask(text, Sampling(max_tokens=1, logprobs=0), "score"))
    found = {}
    while not engine.idle:
        found |= {event.request: event.scores[1:] for event in engine.step() if isinstance(event, PromptScored)}
    return -torch.tensor([[score.logprob for score in found[number] if score] for number in sorted(found)], dtype=torch.float64)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_texts_are_nearly_as_likely_as_from_whole_pages(tiny: Tiny, family: str, dtype: torch.dtype) -> None:
    model = wide(tiny, family).to(dtype)
    texts = texts_of(model, 30)
    plain, coded = (losses(model, texts, config) for config in (AUTO, INT8))
    rise, apart = ((coded.mean() - plain.mean()) / plain.mean()).item(), (coded - plain).abs().mean().item()
    assert 0 < apart < 0.03, "0.008 to 0.014 nats were seen"
    assert abs(rise) < 0.001, "at most 0.0001 was seen"


# -- the same bits, over more than one group -----------------------------------------------------------------------


@NEEDS_NATIVE
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_wide_entries_warm_up_to_the_same_bits(tiny: Tiny, family: str) -> None:
    assert warm_up(Engine(wide(tiny, family), INT8)) is True


@NEEDS_NATIVE
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_chunks_and_company_do_not_change_a_bit_of_wide_entries(tiny: Tiny, family: str) -> None:
    model = wide(tiny, family).to(torch.bfloat16)
    texts = texts_of(model, 6)
    small = INT8.model_copy(update={"page_tokens": 4, "scheduler": INT8.scheduler.model_copy(update={"step_tokens": 7})})
    together = losses(model, texts, small)
    assert torch.equal(together, torch.cat([losses(model, [text], INT8) for text in texts]))


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(model: Decoder, config: EngineConfig, message: str, folder: Path) -> None:
    """By an engine around a model, and before a folder's weights are loaded."""
    with pytest.raises(ConfigError, match=f"engine.cache_dtype=int8: .*{message}.*cache_dtype=auto"):
        Engine(model, config)
    save_checkpoint(model, folder, folder)
    with pytest.raises(ConfigError, match=message):
        check_room(folder, config)


@pytest.mark.usefixtures("pytorch_alone")
def test_without_native_kernels_it_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    refused(tiny("llama"), INT8, "native kernels are not installed: install", tmp_path)


@NEEDS_NATIVE
def test_an_indexer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    refused(tiny("deepseek_v32"), INT8, "this model's indexer can't choose among codes", tmp_path)


@NEEDS_NATIVE
def test_numbers_that_depend_on_the_batch_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    refused(tiny("llama"), INT8.model_copy(update={"batch_invariant": False}), "need engine.batch_invariant=true", tmp_path)


@NEEDS_NATIVE
def test_entries_wider_than_the_kernels_take_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    attention = LATENTS.model_copy(update={"kv_lora_rank": 1024})
    refused(tiny("deepseek_v3", attention=attention), INT8, "at most 1024, not 1040", tmp_path)


@NEEDS_NATIVE
def test_another_dtype_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"not on torch.float16: set engine.dtype"):
        pool_of(tiny("llama").config, INT8, torch.float16)
