"""Junctions: scaled along, a model computes what it did; all of its columns are on the map; a wrong map is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from filled import filled
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES
from torch import Tensor, nn
from toys import VOCABULARY, Theirs, agree, prompt

from lineshaft.base.errors import ConfigError
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.junction import Junction, Port, ports, scale
from lineshaft.model.linear import Linear
from lineshaft.model.moe import Router
from lineshaft.model.norm import RmsNorm
from lineshaft.ops.formats import Integer

Get = Callable[[str], Theirs]
TOKENS = 24
FAMILIES = [
    *("llama", "llama-biased", "mistral-window", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("deepseek", "deepseek-biased", "deepseek-direct-query", "deepseek_v2", "deepseek_v2-groups", "deepseek_v32"),
]
CASES = pytest.mark.parametrize("name", SHAPES)


def model_of(name: str, seed: int = 0) -> Decoder:
    return filled(SHAPES[name], seed)


def junctions_of(model: Decoder) -> dict[str, Junction]:
    return {junction.name: junction for junction in model.junctions()}


def results(model: Decoder) -> dict[str, Tensor]:
    """Of two documents: hidden states, logits, and those of each prediction layer, and the experts that every router chose."""
    chosen: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda _, __, out: chosen.append(out[1].sort(-1).values)) for router in model.routers()]
    tokens, attend = torch.tensor(prompt(TOKENS)), PackedCausal([0, 10], TOKENS)
    positions = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)])
    with torch.inference_mode():
        hidden = model.hidden(tokens, positions, attend)
        out = {"hidden": hidden, "logits": model.logits(hidden)}
        for depth in range(model.config.num_nextn_predict_layers):
            hidden = model.draft(depth, hidden, tokens.roll(-1 - depth), positions, attend)
            out |= {f"draft {depth}": hidden, f"draft logits {depth}": model.logits(hidden)}
    for hook in hooks:
        hook.remove()
    return out | {f"experts {number}": experts for number, experts in enumerate(chosen)}


def scaled_by(model: Decoder, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results after scaling these junctions, with the final norm's own scale taken out of what `hidden` shows."""
    found = junctions_of(model)
    for name, s_C in factors.items():
        scale(model, found[name], s_C)
    out = results(model)
    return out | {"hidden": out["hidden"] * factors["model.norm"]} if "model.norm" in factors else out


def random_factors(model: Decoder, seed: int) -> dict[str, Tensor]:
    """Between 1/8 and 8, for every channel of every junction."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 8 ** (2 * torch.rand(junction.channels, generator=generator) - 1) for name, junction in junctions_of(model).items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    """Numbers within `tolerance` of the largest one, experts equal."""
    near = (
        float((after[what] - seen).abs().max() / seen.abs().max()) <= tolerance for what, seen in before.items() if "experts" not in what
    )
    return (
        before.keys() == after.keys() and all(near) and all(torch.equal(after[what], before[what]) for what in before if "experts" in what)
    )


# -- scaling changes nothing ------------------------------------------------------------------------------------------


@CASES
def test_scaling_every_junction_leaves_what_the_model_computes(name: str) -> None:
    model = model_of(name)
    before, weights = results(model), {at: weight.clone() for at, weight in model.state_dict().items()}
    assert same(before, scaled_by(model, random_factors(model, seed=3)))
    changed = {at for at, weight in model.state_dict().items() if not torch.equal(weight, weights[at])}
    assert len(changed) > len(model.linears()) - 2, "the scales were planted, not skipped"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(SHAPES)), seed=st.integers(0, 2**20))
def test_powers_of_two_leave_every_bit_whichever_junctions_they_scale(data: st.DataObject, name: str, seed: int) -> None:
    model = model_of(name, seed)
    before, found, weights = results(model), junctions_of(model), {at: weight.clone() for at, weight in model.state_dict().items()}
    chosen = data.draw(st.lists(st.sampled_from(list(found)), min_size=1, max_size=6, unique=True))
    generator = torch.Generator().manual_seed(seed)
    factors = {at: 2.0 ** torch.randint(-3, 4, (found[at].channels,), generator=generator) for at in chosen}
    after = scaled_by(model, factors)
    assert all(torch.equal(after[what], seen) for what, seen in before.items())
    for at, s_C in factors.items():
        scale(model, found[at], 1 / s_C)
    assert all(torch.equal(weight, weights[at]) for at, weight in model.state_dict().items()), "scaled back it is what it was"


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_answers_as_before_from_the_scaled_checkpoint(name: str, theirs: Get, tmp_path: Path) -> None:
    """Their model, not ours, says that the scaled files mean the same."""
    model = load_checkpoint(theirs(name).folder)
    for at, s_C in random_factors(model, seed=5).items():
        scale(model, junctions_of(model)[at], s_C)
    save_checkpoint(model, tmp_path / "scaled", theirs(name).folder)
    kind = getattr(transformers, type(theirs(name).model).__name__)
    with torch.inference_mode():
        logits = kind.from_pretrained(tmp_path / "scaled").eval()(torch.tensor([prompt(TOKENS)])).logits[0]
    expected = theirs(name).logits(prompt(TOKENS))
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-4


# -- a wrong map is seen ----------------------------------------------------------------------------------------------


def heads_repeated_in_turn(found: dict[str, Junction]) -> Junction:
    """repeat instead of repeat_interleave: as if the query heads of a group did not stand together."""
    values = found["model.layers.0.self_attn.values"]
    return replace(values, readers=(Port(values.readers[0].module, torch.arange(values.channels).repeat(2)),))


def key_rows_for_value_rows(found: dict[str, Junction]) -> Junction:
    values = found["model.layers.0.self_attn.values"]
    (writer,) = values.writers
    assert writer.channel_R is not None
    return replace(values, writers=(Port(writer.module, writer.channel_R.view(4, -1).flip(1).flatten()),))


def a_gate_taken_for_a_writer(found: dict[str, Junction]) -> Junction:
    inside = found["model.layers.0.mlp.intermediate"]
    return replace(inside, writers=inside.gates)


def without(junction: Junction, reader: str) -> Junction:
    return replace(junction, readers=tuple(port for port in junction.readers if not port.module.endswith(reader)))


def a_router_forgotten(found: dict[str, Junction]) -> Junction:
    return without(found["model.layers.1.post_attention_layernorm"], "model.layers.1.mlp.gate")


def an_output_gate_forgotten(found: dict[str, Junction]) -> Junction:
    return without(found["model.layers.1.post_attention_layernorm"], "shared_expert_gate")


def an_added_gate_forgotten(found: dict[str, Junction]) -> Junction:
    return without(found["model.layers.1.post_attention_layernorm"], "added_experts.1.gate")


def head_weights_forgotten(found: dict[str, Junction]) -> Junction:
    return without(found["model.layers.0.input_layernorm"], "weights_proj")


def the_indexers_queries_forgotten(found: dict[str, Junction]) -> Junction:
    norm = found["model.layers.0.self_attn.q_a_layernorm"]
    return replace(norm, readers=ports("model.layers.0.self_attn", "q_b_proj"))


def halves_in_the_other_order(found: dict[str, Junction]) -> Junction:
    return replace(found["model.layers.3.enorm"], readers=found["model.layers.3.hnorm"].readers)


def a_final_norm_beside_prediction_layers(found: dict[str, Junction]) -> Junction:
    return Junction("model.norm", 32, ports("model", "norm"), (Port("lm_head"),))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (heads_repeated_in_turn, "llama"),
        (heads_repeated_in_turn, "qwen3-moe"),
        (key_rows_for_value_rows, "deepseek-v3"),
        (key_rows_for_value_rows, "deepseek-v3-wide-values"),
        (a_gate_taken_for_a_writer, "llama"),
        (a_router_forgotten, "mixtral"),
        (a_router_forgotten, "deepseek-v3"),
        (an_output_gate_forgotten, "qwen2-moe"),
        (an_added_gate_forgotten, "deepseek-v3-added"),
        (head_weights_forgotten, "deepseek-v32"),
        (the_indexers_queries_forgotten, "deepseek-v32"),
        (halves_in_the_other_order, "deepseek-v3-mtp"),
        (a_final_norm_beside_prediction_layers, "deepseek-v3-mtp"),
    ],
)
def test_a_wrong_map_turns_the_comparison_red(wrong: Callable[[dict[str, Junction]], Junction], name: str) -> None:
    model = model_of(name)
    before, junction = results(model), wrong(junctions_of(model))
    scale(model, junction, random_factors(model, seed=3).get(junction.name, torch.linspace(0.2, 5, junction.channels)))
    after = results(model)
    if junction.name == "model.norm":  # as `scaled_by`: not what is shown differs, but what comes of it
        del before["hidden"], after["hidden"]
    assert not same(before, after)


# -- the map is whole -------------------------------------------------------------------------------------------------


def rows(model: Decoder, port: Port) -> int:
    return len(model.get_submodule(port.module).weight)


def columns(model: Decoder, port: Port) -> int:
    return model.get_submodule(port.module).weight.shape[1]


def places(port: Port, count: int) -> list[tuple[str, int]]:
    """(module, row or column) of everything that a port lays hold of."""
    held = range(count) if port.channel_R is None else (port.channel_R >= 0).nonzero().flatten().tolist()
    return [(port.module, place) for place in held]


@CASES
def test_ports_name_modules_that_exist_and_fit_them(name: str) -> None:
    model = model_of(name)
    found = model.junctions()
    assert len({junction.name for junction in found}) == len(found)
    for junction in found:
        written = [(port, rows(model, port)) for port in (*junction.writers, *junction.gates)]
        for port, size in [*written, *((port, columns(model, port)) for port in junction.readers)]:
            channel_R = torch.arange(junction.channels) if port.channel_R is None else port.channel_R
            assert channel_R.dtype == torch.int64
            assert len(channel_R) == size, port.module
            assert set(channel_R.tolist()) - {-1} == set(range(junction.channels)), f"{port.module} holds every channel"
        for port, size in written:
            assert len(places(port, size)) == junction.channels, f"{port.module} writes each channel once"


def left_out(model: Decoder) -> dict[str, str]:
    """Modules without a junction that one could look for, and the reason."""
    left = {}
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in ("q_norm", "k_norm"):
            left[name] = "channels of queries and keys are rotated, or meet ReLU"
        if name.endswith("shared_head.norm"):
            left[name] = "the head it writes for reads the final norm as well"
    if model.lm_head is None:
        left["model.norm"] = "its reader is the embedding table"
    elif model.config.num_nextn_predict_layers:
        left["model.norm"] = "prediction layers norm what it writes"
        left["lm_head"] = "read from the final norm and from the norms of prediction layers"
    return left


@CASES
def test_every_column_of_every_matrix_is_read_once(name: str) -> None:
    """Not only of `Linear`: routers, gates of outputs and an indexer's weights read the same channels."""
    model = model_of(name)
    taken = Counter(place for junction in model.junctions() for port in junction.readers for place in places(port, columns(model, port)))
    matrices = {at: module for at, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)}
    wanted = {
        (at, column)
        for at, module in matrices.items()
        if module.weight.ndim == 2 and not isinstance(module, nn.Embedding) and at not in left_out(model)
        for column in range(module.weight.shape[1])
    }
    assert set(taken) == wanted
    assert set(taken.values()) == {1}


@CASES
def test_every_norm_writes_one_junction(name: str) -> None:
    model = model_of(name)
    writers = Counter(port.module for junction in model.junctions() for port in junction.writers)
    norms = {at for at, module in model.named_modules() if isinstance(module, RmsNorm | nn.LayerNorm)}
    assert {at: writers[at] for at in norms} == {at: int(at not in left_out(model)) for at in norms}


@CASES
def test_no_row_is_written_for_two_junctions(name: str) -> None:
    model = model_of(name)
    written = [port for junction in model.junctions() for port in (*junction.writers, *junction.gates)]
    taken = Counter(place for port in written for place in places(port, rows(model, port)))
    assert set(taken.values()) == {1}


def test_the_junctions_of_a_small_llama_are_these() -> None:
    layers = [
        f"model.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("input_layernorm", "self_attn.values", "post_attention_layernorm", "mlp.intermediate")
    ]
    assert [junction.name for junction in model_of("llama").junctions()] == [*layers, "model.norm"]


# -- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_scaled_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model = model_of("llama-biased").to(dtype)
    junction, s_C = junctions_of(model)["model.layers.0.mlp.intermediate"], torch.linspace(0.3, 3, 40)
    mlp = model.model.layers[0].mlp
    before = {name: tensor.double().clone() for name, tensor in mlp.state_dict().items()}
    scale(model, junction, s_C)
    expected = {
        **{name: tensor for name, tensor in before.items() if name.startswith("gate")},
        "up_proj.weight": before["up_proj.weight"] / s_C.double()[:, None],
        "up_proj.bias": before["up_proj.bias"] / s_C.double(),
        "down_proj.weight": before["down_proj.weight"] * s_C.double(),
        "down_proj.bias": before["down_proj.bias"],
    }
    for name, tensor in mlp.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].float().to(dtype)), name


def test_a_scaled_model_is_saved_under_the_same_names_and_its_source_is_not_written_to(theirs: Get, tmp_path: Path) -> None:
    """Loaded weights are mapped from the source's files."""
    folder = theirs("qwen2").folder
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = load_checkpoint(folder)
    names = list(model.state_dict())
    for junction in model.junctions():
        scale(model, junction, torch.linspace(0.2, 5, junction.channels))
    assert list(model.state_dict()) == names
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    save_checkpoint(model, tmp_path / "out", folder)
    tokens = torch.tensor(prompt(TOKENS))
    logits = load_checkpoint(tmp_path / "out")(tokens, torch.arange(TOKENS), PackedCausal([0], TOKENS))
    assert logits.shape == (TOKENS, VOCABULARY)
    assert agree(logits, theirs("qwen2").logits(prompt(TOKENS)), 1e-4)


def refused(model: Decoder, junction: Junction, s_C: Tensor, match: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=match):
        scale(model, junction, s_C)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing was scaled"


def test_what_is_compressed_or_packed_is_refused_by_name_and_nothing_is_scaled() -> None:
    model = model_of("qwen2-moe")
    junction, ones = junctions_of(model)["model.layers.2.post_attention_layernorm"], torch.ones(32)
    expert = model.get_submodule("model.layers.2.mlp.experts.7.up_proj")
    assert isinstance(expert, Linear)
    expert.recode(Integer(8))
    refused(model, junction, 2 * ones, r"model\.layers\.2\.mlp\.experts\.7\.up_proj is stored as int8.*only dense")
    expert.dequantise(torch.float32)
    router = model.get_submodule("model.layers.2.mlp.gate")
    assert isinstance(router, Router)
    router.packed = (0, 0, 0), torch.zeros(1)  # type: ignore[assignment] # whatever it holds, the kernels would go on reading it
    refused(model, junction, 2 * ones, r"model\.layers\.2\.mlp\.gate is packed")


def test_scales_that_do_not_fit_are_refused_and_nothing_is_scaled() -> None:
    model = model_of("llama")
    junction = junctions_of(model)["model.layers.0.mlp.intermediate"]
    refused(model, junction, torch.ones(39), r"intermediate has 40 channels: scale it by \[40\], not \[39\]")
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        s_C = torch.ones(40)
        s_C[7] = bad
        refused(model, junction, s_C, "finite and above zero")
    refused(model.half(), junction, torch.full((40,), 1e7), r"down_proj: scaled by .*intermediate it is not finite in torch\.float16")


# -- ports ------------------------------------------------------------------------------------------------------------


@given(channel_R=st.lists(st.integers(-1, 6), min_size=1, max_size=20), data=st.data())
def test_a_port_spreads_and_gathers_as_a_loop_would(channel_R: list[int], data: st.DataObject) -> None:
    values = st.floats(0, 9, width=32)
    port = Port("any", torch.tensor(channel_R))
    of_channel = data.draw(st.lists(values, min_size=7, max_size=7))
    assert port.spread(torch.tensor(of_channel)).tolist() == [1.0 if at < 0 else of_channel[at] for at in channel_R]
    of_row = data.draw(st.lists(values, min_size=len(channel_R), max_size=len(channel_R)))
    largest = [max((value for at, value in zip(channel_R, of_row, strict=True) if at == channel), default=0.0) for channel in range(7)]
    assert port.largest(torch.tensor(of_row), 7).tolist() == largest
