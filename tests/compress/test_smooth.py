"""SmoothQuant: the paper's equation by hand, the same answers, and what eight bits lose with outliers before and after."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from filled import filled
from hypothesis import given
from hypothesis import strategies as st
from shapes import SHAPES
from torch import Tensor, nn
from toys import logits_of, prompt

from lineshaft.base.errors import ConfigError
from lineshaft.compress.smooth import largest_read, smooth, smoothing
from lineshaft.model.decoder import Decoder
from lineshaft.model.junction import Junction, scale
from lineshaft.model.linear import Linear
from lineshaft.model.norm import RmsNorm
from lineshaft.ops.formats import Integer

TEXT = prompt(40)
W8A8 = Integer(8, activations="int8")
FAMILIES = ["llama", "qwen2", "qwen3", "mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3", "deepseek-v3-wide-values"]


def by_norm(model: Decoder, junction: Junction) -> bool:
    return isinstance(model.get_submodule(junction.writers[0].module), RmsNorm)


def maxima_of(model: Decoder) -> dict[str, Tensor]:
    """Of each junction's channels over a text: what a norm gives out; elsewhere what the first reader takes in."""
    found = {junction.name: torch.zeros(junction.channels) for junction in model.junctions()}

    def written(junction: Junction, _: nn.Module, __: object, out_TC: Tensor) -> None:
        found[junction.name] = torch.maximum(found[junction.name], out_TC.abs().amax(0))

    def read(junction: Junction, _: nn.Module, taken: tuple[Tensor]) -> None:
        seen_C = junction.readers[0].largest(taken[0].abs().amax(0), junction.channels)
        found[junction.name] = torch.maximum(found[junction.name], seen_C)

    hooks = []
    for junction in model.junctions():
        writer, reader = (model.get_submodule(port.module) for port in (junction.writers[0], junction.readers[0]))
        if by_norm(model, junction):
            hooks.append(writer.register_forward_hook(partial(written, junction)))
        else:
            hooks.append(reader.register_forward_pre_hook(partial(read, junction)))
    logits_of(model, TEXT)
    for hook in hooks:
        hook.remove()
    return found


def with_outliers(name: str, times: float = 30.0) -> Decoder:
    """What norms give out is so many times as large in two channels, and read so many times as weakly."""
    model = filled(SHAPES[name], spread=0.15)
    for junction in model.junctions():
        if by_norm(model, junction):
            s_C = torch.ones(junction.channels)
            s_C[[1, 7]] = 1 / times
            scale(model, junction, s_C)
    return model


def rounding_error(model: Decoder) -> float:
    """How far logits go, as a share of them, when every linear layer is INT8 and so is what meets it."""
    before = logits_of(model, TEXT)
    for linear in model.linears().values():
        if linear.in_features % 4 == 0:
            linear.recode(W8A8)
    return float((logits_of(model, TEXT) - before).norm() / before.norm())


# -- the equation -----------------------------------------------------------------------------------------------------


@given(
    pairs=st.lists(st.tuples(*[st.just(0.0) | st.floats(2**-10, 2**10, width=32)] * 2), min_size=1, max_size=9),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
)
def test_s_is_equation_4_by_hand_and_1_for_dead_channels(pairs: list[tuple[float, float]], alpha: float) -> None:
    amax, weight = np.array(pairs).T
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where((amax == 0) | (weight == 0), 1.0, amax**alpha / weight ** (1 - alpha))
    s_C = smoothing(torch.from_numpy(amax), torch.from_numpy(weight), alpha)
    np.testing.assert_allclose(s_C.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "deepseek-v3-added", "deepseek-v32"])
def test_the_largest_weight_is_looked_for_in_the_columns_of_all_readers(name: str) -> None:
    """A loop over columns; grouped heads read a channel several times, a half of eh_proj not at all."""
    model = filled(SHAPES[name])
    for junction in model.junctions():
        largest = np.zeros(junction.channels)
        for port in junction.readers:
            weight = np.abs(model.get_submodule(port.module).weight.detach().numpy())
            channels = range(junction.channels) if port.channel_R is None else port.channel_R.tolist()
            for column, channel in enumerate(channels):
                if channel >= 0:
                    largest[channel] = max(largest[channel], weight[:, column].max())
        assert np.array_equal(largest_read(model, junction).numpy(), largest.astype(np.float32)), junction.name


def test_with_half_the_strength_activations_and_weights_end_up_equally_large() -> None:
    model = with_outliers("deepseek-v3")
    smooth(model, maxima_of(model))
    after = maxima_of(model)
    for junction in model.junctions():
        if by_norm(model, junction):
            assert torch.allclose(after[junction.name], largest_read(model, junction), rtol=1e-4), junction.name


# -- what it leaves alone, and what it is for -------------------------------------------------------------------------


@pytest.mark.parametrize("norms_only", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "llama-tied", "deepseek-v3-mtp", "deepseek-v32"])
def test_answers_stay(name: str, norms_only: bool) -> None:
    model = filled(SHAPES[name])
    before, maxima = logits_of(model, TEXT), maxima_of(model)
    scales = smooth(model, maxima, 0.75, norms_only)
    assert scales.keys() == {junction.name for junction in model.junctions() if not norms_only or by_norm(model, junction)}
    assert any(not torch.equal(s_C, torch.ones_like(s_C)) for s_C in scales.values())
    assert float((logits_of(model, TEXT) - before).abs().max() / before.abs().max()) <= 1e-4


def test_by_default_nothing_but_norms_is_divided() -> None:
    model = filled(SHAPES["llama-biased"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scales = smooth(model, maxima_of(model))
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.o_proj.weight"], before["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.v_proj.bias"], before["model.layers.0.self_attn.v_proj.bias"])
    s_C = scales["model.layers.0.input_layernorm"]
    expected = before["model.layers.0.self_attn.v_proj.weight"] * s_C
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.v_proj.weight"], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_outliers_eight_bits_lose_less_than_half_of_what_they_lost(name: str) -> None:
    plain, smoothed = with_outliers(name), with_outliers(name)
    smooth(smoothed, maxima_of(smoothed))
    assert rounding_error(smoothed) <= 0.5 * rounding_error(plain)


def test_so_does_a_layer_whose_weights_know_nothing_of_the_outliers() -> None:
    """As in the paper's figure 2: channels of activations fifty times as large, weights all alike."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 128, generator=generator), torch.randn(64, 128, generator=generator) * 0.05
    x[:, [3, 77]] *= 50
    s_C = smoothing(x.abs().amax(0), weight.abs().amax(0))

    def error(x_TI: Tensor, weight_OI: Tensor) -> float:
        layer = Linear(128, 64)
        layer.weight.data = weight_OI.clone()
        layer.recode(W8A8)
        return float((layer(x_TI) - x @ weight.T).norm())

    assert error(x / s_C, weight * s_C) <= 0.5 * error(x, weight)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(model: Decoder, maxima: dict[str, Tensor], match: str, alpha: float = 0.5) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=match):
        smooth(model, maxima, alpha)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing was scaled"


def test_what_can_not_be_smoothed_is_refused_by_name_and_nothing_is_scaled() -> None:
    model = filled(SHAPES["llama"])
    maxima, last = maxima_of(model), "model.layers.2.post_attention_layernorm"
    refused(model, {**maxima, "model.layers.0.norm": torch.ones(32)}, r'"model\.layers\.0\.norm" is no junction.*input_layernorm')
    refused(model, {name: found for name, found in maxima.items() if name != last}, rf"{last} has no maxima")
    refused(model, {**maxima, last: torch.ones(31)}, rf"{last}: maxima of \[31\] channels do not fit the \[32\]")
    for bad in (-1.0, float("nan"), float("inf")):
        refused(model, {**maxima, last: torch.full((32,), bad)}, rf"{last}: maxima must be finite")
    for alpha in (-0.1, 1.1, float("nan")):
        refused(model, maxima, "alpha", alpha)
    model.get_submodule("model.layers.2.mlp.gate_proj").recode(W8A8)
    refused(model, maxima, r"model\.layers\.2\.mlp\.gate_proj is stored as int8")
