"""Units taken out: what is left computes what the model does with these silenced, for us and for transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from filled import filled
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES
from torch import Tensor
from toys import TOKENS, Theirs, agree, logits_of, prompt

from lineshaft.base.errors import ConfigError
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.model.hf.attention import heads_load_elsewhere
from lineshaft.model.hf.config import is_native, meaning
from lineshaft.model.layer import Layer
from lineshaft.model.moe import ExpertBlock
from lineshaft.model.shrink import Cut, each, size_of, without
from lineshaft.model.units import Units

Get = Callable[[str], Theirs]


def with_experts(name: str, **changes: int) -> ModelConfig:
    config = SHAPES[name]
    assert config.moe is not None
    return config.model_copy(update={"moe": config.moe.model_copy(update=changes)})


ALL = {**SHAPES, "deepseek-v3-groups-of-three": with_experts("deepseek-v3", n_routed_experts=12, num_experts_per_tok=2)}
CASES = pytest.mark.parametrize("name", ALL)
FAMILIES = [
    *("llama", "llama-biased", "mistral-window", "mixtral", "mixtral-one-expert-tied", "qwen2", "qwen2-window-in-upper-layers"),
    *("qwen2_moe", "qwen2_moe-window-in-even-layers", "qwen3", "qwen3_moe", "qwen3_moe-dense-layers"),
    *("deepseek", "deepseek-biased", "deepseek-direct-query", "deepseek-groups", "deepseek-two-shared", "deepseek_v2", "deepseek_v32"),
]


def results(model: Decoder) -> dict[str, Tensor]:
    """Logits of two documents, and those of prediction layers."""
    tokens, attend = torch.tensor(prompt(24)), PackedCausal([0, 10], 24)
    positions = torch.cat([torch.arange(10), torch.arange(14)])
    with torch.inference_mode():
        hidden = model.hidden(tokens, positions, attend)
        out = {"logits": model.logits(hidden)}
        for depth in range(model.config.num_nextn_predict_layers):
            hidden = model.draft(depth, hidden, tokens.roll(-1 - depth), positions, attend)
            out[f"draft {depth}"] = model.logits(hidden)
    return out


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    near = (float((other[at] - seen).abs().max() / seen.abs().max()) < tolerance for at, seen in one.items())
    return one.keys() == other.keys() and all(near)


def cuts_of(model: Decoder, choose: Callable[[Units, int], list[int]], kinds: tuple[str, ...] = ()) -> list[Cut]:
    """`choose(units, how many)` says which units of each block go: a quarter of each size, or one."""
    found = []
    for units in model.units():
        size = size_of(model.config, units.size)
        step = 4 if units.kind == "channels" else units.groups  # transformers' product of experts wants strides of 16 bytes
        count = each(model.config, units) * step * max(1, size // 4 // step)
        least = 2 if units.groups > 1 else each(model.config, units)  # a group is judged by its two best experts
        if (not kinds or units.kind in kinds) and (units.count - count) // units.groups >= least:
            found.append(Cut(units, dict.fromkeys(choose(units, count))))
    return found


def some(seed: int) -> Callable[[Units, int], list[int]]:
    """Random units, as many of each group."""
    generator = torch.Generator().manual_seed(seed)

    def choose(units: Units, count: int) -> list[int]:
        size = units.count // units.groups
        places = [torch.randperm(size, generator=generator)[: count // units.groups] + group * size for group in range(units.groups)]
        return torch.cat(places).tolist()

    return choose


# -- the map ----------------------------------------------------------------------------------------------------------


@CASES
def test_units_lie_evenly_in_tensors_that_exist(name: str) -> None:
    model = filled(ALL[name])
    found, state = model.units(), model.state_dict()
    assert len({units.name for units in found}) == len(found)
    for units in found:
        assert units.count % units.groups == 0
        assert units.count == each(model.config, units) * size_of(model.config, units.size)
        for place in (*units.own, *units.readers):
            assert state[place.tensor].shape[place.axis] % units.count == 0, place


@CASES
def test_channels_are_those_of_the_junctions_and_none_is_left_out(name: str) -> None:
    model = filled(ALL[name])
    biased = {at.removesuffix(".bias") for at in model.state_dict() if at.endswith(".bias")}
    junctions = {junction.name: junction for junction in model.junctions() if junction.name.endswith(".intermediate")}
    assert junctions.keys() == {units.name for units in model.units() if units.kind == "channels"}
    for units in model.units():
        if units.kind == "channels":
            junction = junctions[units.name]
            written = {port.module for port in (*junction.writers, *junction.gates)}
            assert {place.tensor for place in units.own} == {f"{at}.weight" for at in written} | {f"{at}.bias" for at in written & biased}
            assert [(place.tensor, place.axis) for place in units.readers] == [(f"{port.module}.weight", 1) for port in junction.readers]
            assert all(place.axis == 0 for place in units.own)


# -- what is left -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def silence(model: Decoder, cuts: list[Cut]) -> None:
    """Let these units give nothing, found by what the modules are and not by the map. Experts are never chosen."""
    for cut in cuts:
        gone = torch.tensor(list(cut.gone))
        if cut.units.kind == "layers":
            for layer in gone.tolist():
                silence_layer(model.model.layers[layer])
        elif cut.units.kind == "experts":
            block = model.get_submodule(cut.units.name.removesuffix(".experts"))
            assert isinstance(block, ExpertBlock)
            forget(block, gone)
        else:
            last = model.get_submodule(cut.units.name.rpartition(".")[0])
            reader = last.down_proj if cut.units.kind == "channels" else last.o_proj
            columns = torch.arange(reader.in_features).view(cut.units.count, -1)[gone].flatten()
            reader.weight[:, columns] = 0


def silence_layer(layer: torch.nn.Module) -> None:
    for at, parameter in layer.named_parameters():
        if any(part in at for part in ("o_proj", "down_proj")):
            parameter.zero_()


def forget(block: ExpertBlock, gone: Tensor) -> None:
    plain = block.gate._logits
    block.gate._logits = lambda x: plain(x).index_fill(1, gone, -torch.inf)  # type: ignore[method-assign]
    if block.gate.e_score_correction_bias is not None:
        block.gate.e_score_correction_bias[gone] = -torch.inf


@CASES
@pytest.mark.parametrize("kind", ["channels", "heads", "experts", "layers"])
def test_what_is_left_computes_what_the_model_does_with_the_rest_silenced(name: str, kind: str) -> None:
    model = filled(ALL[name])
    cuts = cuts_of(model, some(1), (kind,))
    if not cuts or (kind == "layers" and len(model.config.reach) > 1 and model.config.num_nextn_predict_layers):
        pytest.skip("there are none, or too few")
    before = results(model)
    smaller = without(model, cuts)
    assert same(before, results(model), 1e-9), "the model itself is not touched"
    silence(model, cuts)
    assert same(results(model), results(smaller))
    assert not same(before, results(smaller)), "what was cut counted"
    sizes = {cut.units.size for cut in cuts}
    assert all(size_of(smaller.config, size) < size_of(ALL[name], size) for size in sizes)


@settings(max_examples=25)
@given(name=st.sampled_from(list(ALL)), seed=st.integers(0, 2**20))
def test_all_kinds_at_once(name: str, seed: int) -> None:
    model = filled(ALL[name], seed)
    cuts = cuts_of(model, some(seed))
    smaller = without(model, cuts)
    # A layer that goes hides what else was cut of it; experts and channels of one block are silenced one beside the other.
    silence(model, cuts)
    assert same(results(model), results(smaller))
    assert {at: len(cut.kept) for cut in cuts for at in [cut.units.size] if each(model.config, cut.units) == 1} == {
        cut.units.size: size_of(smaller.config, cut.units.size) for cut in cuts if each(model.config, cut.units) == 1
    }
    assert [layer.index for layer in smaller.model.layers if isinstance(layer, Layer)] == list(range(smaller.config.all_layers))
    assert all(float(router.load.sum()) == 0 for router in smaller.routers())


@CASES
def test_copies_go_without_a_trace(name: str) -> None:
    """Unit 1 works as unit 0 does, and is read otherwise."""
    model = filled(ALL[name])
    cuts = []
    for units in model.units():
        times = each(model.config, units)
        if units.readers and units.count > 2 * times:
            for place in units.own:
                blocks = torch.unflatten(model.state_dict()[place.tensor], place.axis, (units.count, -1))
                blocks[1 : 1 + times] = blocks[:1]
            cuts.append(Cut(units, dict.fromkeys(range(1, 1 + times), 0)))
    assert cuts
    before = results(model)
    assert same(before, results(without(model, cuts)))
    bare = [Cut(cut.units, dict.fromkeys(cut.gone)) for cut in cuts]
    assert not same(before, results(without(model, bare))), "a copy's own readers counted"


def test_a_stand_in_that_goes_later_hands_both_on() -> None:
    model = filled(SHAPES["llama"])
    (units,) = [units for units in model.units() if units.name == "model.layers.0.mlp.intermediate"]
    others = [Cut(other, {0: None, 1: None}) for other in model.units() if other.kind == "channels" and other != units]
    read = model.state_dict()["model.layers.0.mlp.down_proj.weight"].clone()
    smaller = without(model, [*others, Cut(units, {0: 1, 1: 2})])
    found = smaller.state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(found[:, 0], read[:, :3].sum(1), atol=1e-6)
    assert torch.equal(found[:, 1:], read[:, 3:])


# -- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_left_and_gives_our_logits(name: str, theirs: Get, tmp_path: Path) -> None:
    model = load_checkpoint(theirs(name).folder)
    smaller = without(model, [cut for cut in cuts_of(model, some(2)) if heads_fit(model, cut)])
    assert is_native(smaller.config)
    save_checkpoint(smaller, tmp_path / "small", theirs(name).folder)
    again = load_checkpoint(tmp_path / "small")
    assert meaning(again.config) == meaning(smaller.config)
    tokens = prompt(TOKENS)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert {what: found for what, found in info.items() if found} == {}
    with torch.inference_mode():
        there = loaded.eval()(torch.tensor([tokens])).logits[0]
    assert agree(logits_of(again, tokens), there)
    assert torch.equal(logits_of(again, tokens), logits_of(smaller, tokens))


def heads_fit(model: Decoder, cut: Cut) -> bool:
    """Transformers has two families whose heads must divide the hidden size."""
    a = model.config.attention
    left = len(cut.kept) * a.num_attention_heads // cut.units.count
    return cut.units.kind != "heads" or heads_load_elsewhere(
        model.config.model_copy(update={"attention": a.model_copy(update={"num_attention_heads": left})})
    )


@pytest.mark.parametrize(("name", "takes"), [("llama-mha", False), ("deepseek_v2", False), ("deepseek", True), ("mistral", True)])
def test_transformers_takes_three_heads_for_a_hidden_size_of_32_or_not(name: str, takes: bool, theirs: Get, tmp_path: Path) -> None:
    model = load_checkpoint(theirs(name).folder)
    a = model.config.attention
    grouped = isinstance(a, GroupedQueryAttention)
    alone = a.model_copy(update={"num_attention_heads": 3} | ({"num_key_value_heads": 3} if grouped else {}))
    config = model.config.model_copy(update={"attention": alone})
    assert heads_load_elsewhere(config) == takes
    save_checkpoint(filled(config), tmp_path / "three", theirs(name).folder)
    if takes:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    else:
        with pytest.raises(Exception, match=r"hidden size \(32\) is not a multiple of the number of attention heads"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "three")


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_would_be_no_model_is_refused() -> None:
    model = filled(SHAPES["deepseek-v3"])
    units = {item.name: item for item in model.units()}
    heads = [item for item in units.values() if item.kind == "heads"]
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.heads: nothing is left of its 4 heads: cut fewer"):
        without(model, [Cut(item, dict.fromkeys(range(4))) for item in heads])
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.heads: 4 heads are left, elsewhere num_attention_heads is 3: cut"):
        without(model, [Cut(heads[0], {0: None})])
    experts = [item for item in units.values() if item.kind == "experts"]
    with pytest.raises(ConfigError, match="n_routed_experts 7 is not a multiple of n_group 4"):
        without(model, [Cut(item, {0: None}) for item in experts])
    with pytest.raises(ConfigError, match="n_group 4 leaves fewer than the two experts"):
        without(model, [Cut(item, dict.fromkeys((0, 2, 4, 6))) for item in experts])
