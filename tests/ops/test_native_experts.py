"""The native kernels of latent attention, routers and experts against their references, alone and in company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineshaft.ops import reference, reference_packed, table
from lineshaft.ops.experts import Feeds, Rule
from lineshaft.ops.formats import Dense, Format, Fp8Block, Integer
from lineshaft.ops.isa import library
from lineshaft.ops.packed import packed_heads_of, packed_of
from lineshaft.ops.packing import pack_dense
from lineshaft.ops.recording import Recorded

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernels here")
DTYPES = [torch.float32, torch.bfloat16]
FORMATS: list[Format] = [
    Dense(),
    Integer(8),
    Integer(8, 8, activations="int8"),
    Integer(4, 8, symmetric=False),
    Integer(4, 8, symmetric=False, activations="int8"),
    Fp8Block((16, 8)),
]
SEEDS = st.integers(0, 10**6)
FEW = settings(max_examples=25)


class Luck:
    """Random tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def feeds(self, fmt: Format, experts: int, hidden: int, width: int) -> Feeds:
        def packed(outputs: int, inputs: int) -> Tensor:
            found = packed_of(fmt, fmt.encode(self.randn(outputs, inputs) / inputs**0.5))
            assert found is not None
            formats.append(found[0])
            return found[1]

        formats: list = []
        gates, ups = (tuple(packed(width, hidden) for _ in range(experts)) for _ in range(2))
        wide = formats[-1]
        downs = tuple(packed(hidden, width) for _ in range(experts))
        return Feeds(gates, ups, downs, wide.shape, formats[-1].shape, wide.whole, formats[-1].whole)

    def routed(self, tokens: int, experts: int, top: int) -> tuple[Tensor, Tensor]:
        chances = torch.rand(tokens, experts, generator=self.generator)
        weights, chosen = chances.topk(top)
        return weights, chosen


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = max(1.0, expected.abs().max().item())
    return got.dtype == expected.dtype and torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FEW
@given(seed=SEEDS, tokens=st.integers(1, 7), width=st.integers(1, 70))
def test_small_ops_are_their_references(dtype: torch.dtype, seed: int, tokens: int, width: int) -> None:
    luck = Luck(seed, dtype)
    x, factor = luck.randn(tokens, width) * 3, luck.randn(tokens, 1)
    strided = luck.randn(tokens, 3, width + 5)[..., 2 : 2 + width]
    with table.steady():
        assert close(table.sigmoid(x), reference.sigmoid(x), dtype)
        assert torch.equal(table.scaled(x, factor), reference.scaled(x, factor))
        assert torch.equal(table.widen(x), reference.widen(x))
        assert torch.equal(table.join(x, strided[:, 1]), reference.join(x, strided[:, 1]))
        other = luck.randn(tokens, 1, 5).expand(-1, 3, -1)
        assert torch.equal(table.join(strided, other), reference.join(strided, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FEW
@given(seed=SEEDS, tokens=st.integers(1, 19), heads=st.integers(1, 5), sizes=st.tuples(st.integers(1, 9), st.integers(1, 150)))
def test_products_by_head_are_right_and_steady(dtype: torch.dtype, seed: int, tokens: int, heads: int, sizes: tuple[int, int]) -> None:
    luck, (inputs, outputs) = Luck(seed, dtype), (4 * sizes[0], sizes[1])
    made = [pack_dense(luck.randn(outputs, inputs)) for _ in range(heads)]
    shape, packed = made[0][0], torch.stack([item[1] for item in made])
    x = luck.randn(tokens, heads, inputs + 6)[..., 2 : 2 + inputs]
    with table.steady():
        got = table.packed_by_head(x, packed, shape)
        assert close(got, reference_packed.packed_by_head(x, packed, shape), dtype)
        assert all(torch.equal(table.packed_by_head(x[row : row + 1], packed, shape)[0], got[row]) for row in range(tokens))


@pytest.mark.parametrize("fmt", [Dense(), Integer(8)], ids=lambda fmt: fmt.describe())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_up_projection_packed_by_head_is_the_same_weight(fmt: Format, dtype: torch.dtype) -> None:
    weight = Luck(1, dtype).randn(3 * (8 + 6), 16)
    stored = fmt.encode(weight)
    found = packed_heads_of(fmt, fmt.decode(stored, dtype), 3, 8)
    assert found is not None
    held, tensors = found
    assert torch.equal(held.decode(tensors, dtype), fmt.decode(stored, dtype))
    assert all(torch.equal(again, tensors[name]) for name, again in held.encode(weight).items())
    assert packed_heads_of(fmt, weight.view(3, -1, 16)[:, 1:].flatten(0, 1), 3, 7) is None  # 7 channels are no whole rows


@FEW
@given(data=st.data(), seed=SEEDS, tokens=st.integers(1, 9), size=st.integers(2, 40), groups=st.integers(1, 5))
def test_routers_choose_and_weigh_like_the_reference(data: st.DataObject, seed: int, tokens: int, size: int, groups: int) -> None:
    luck, experts, best = Luck(seed, torch.float32), size * groups, data.draw(st.integers(1, groups))
    top = data.draw(st.integers(1, min(8, size * best)))
    rule = Rule(top, data.draw(st.booleans()), groups, best, data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 2.5])))
    logits, bias = luck.randn(tokens, experts) * 2, luck.randn(experts) if rule.sigmoid else None
    with table.steady():
        weights, chosen = table.route(logits, bias, rule)
        alone = [table.route(logits[row : row + 1], bias, rule) for row in range(tokens)]
    right_weights, right = reference.route(logits, bias, rule)
    order, right_order = chosen.argsort(-1), right.argsort(-1)
    assert torch.equal(chosen.gather(1, order), right.gather(1, right_order))
    assert close(weights.gather(1, order), right_weights.gather(1, right_order), torch.float32)
    assert all(torch.equal(own[0][0], weights[row]) and torch.equal(own[1][0], chosen[row]) for row, own in enumerate(alone))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_of_equal_experts_the_first_wins_and_no_number_leads_astray(sigmoid: bool) -> None:
    logits = torch.zeros(3, 12)
    logits[1] = torch.nan
    logits[2, 5] = -torch.inf
    with table.steady():
        weights, chosen = table.route(logits, None, Rule(3, sigmoid, groups=3, best_groups=2))
    assert chosen[0].tolist() == [0, 1, 2]
    assert torch.allclose(weights[0], torch.tensor(1 / 3))
    assert ((chosen >= 0) & (chosen < 12)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.describe())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(data=st.data(), seed=SEEDS, tokens=st.integers(1, 40), count=st.integers(1, 9))
def test_experts_are_right_and_steady(fmt: Format, dtype: torch.dtype, data: st.DataObject, seed: int, tokens: int, count: int) -> None:
    luck, top = Luck(seed, dtype), data.draw(st.integers(1, count))
    feeds = luck.feeds(fmt, count, 8 * data.draw(st.integers(1, 12)), 8 * data.draw(st.integers(1, 12)))
    x, (weights, chosen) = luck.randn(tokens, feeds.wide.inputs), luck.routed(tokens, count, top)
    with table.steady():
        got = table.experts(x, weights, chosen, feeds)
        alone = [table.experts(x[row : row + 1], weights[row : row + 1], chosen[row : row + 1], feeds)[0] for row in range(tokens)]
    assert close(got, reference_packed.experts(x, weights, chosen, feeds), dtype)
    assert torch.equal(torch.stack(alone), got)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_experts_are_the_same_for_any_number_of_threads_and_recorded(threads: int) -> None:
    luck, native = Luck(3, torch.bfloat16), library()
    assert native is not None
    feeds, x, (weights, chosen) = luck.feeds(Dense(), 6, 64, 200), luck.randn(50, 64), luck.routed(50, 6, 2)
    with table.steady():
        wanted, before = table.experts(x, weights, chosen, feeds), native.threads()
        native.set_threads(threads)
        try:
            with torch.inference_mode():
                step = Recorded(lambda: table.experts(x, weights, chosen, feeds))
            for tokens in (1, 50, 7):
                step.run(tokens)
                assert torch.equal(step.output[:tokens], wanted[:tokens])
        finally:
            native.set_threads(before)


def test_no_tokens_are_no_work() -> None:
    luck = Luck(1, torch.float32)
    feeds, none = luck.feeds(Dense(), 3, 8, 8), luck.randn(0, 8)
    shape, packed = pack_dense(luck.randn(5, 4))
    with table.steady():
        assert table.experts(none, luck.randn(0, 2), torch.zeros(0, 2, dtype=torch.int64), feeds).shape == (0, 8)
        assert [item.shape for item in table.route(none, None, Rule(2, True))] == [(0, 2)] * 2
        assert table.packed_by_head(luck.randn(0, 1, 4), packed[None], shape).shape == (0, 1, 5)
        assert table.join(none, none).shape == (0, 16)
        assert table.scaled(none, luck.randn(0, 1)).shape == table.sigmoid(none).shape == table.widen(none.bfloat16()).shape == (0, 8)


def test_what_does_not_fit_is_refused() -> None:
    luck = Luck(1, torch.float32)
    feeds, x, (weights, chosen) = luck.feeds(Dense(), 3, 8, 8), luck.randn(2, 8), luck.routed(2, 3, 2)
    with table.steady():
        with pytest.raises(ValueError, match="experts: x is"):
            table.experts(x.bfloat16(), weights, chosen, feeds)
        with pytest.raises(ValueError, match="experts: weights"):
            table.experts(x, weights, chosen.int(), feeds)
        with pytest.raises(ValueError, match="route: logits"):
            table.route(x.bfloat16(), None, Rule(1, False))
        with pytest.raises(ValueError, match="scaled"):
            table.scaled(x, luck.randn(3, 1))
        with pytest.raises(ValueError, match="join"):
            table.join(x, x.bfloat16())
        shape, packed = pack_dense(luck.randn(5, 4))
        with pytest.raises(ValueError, match="packed_by_head"):
            table.packed_by_head(x[:, None], packed[None], shape)
