"""The objective of distillation against float64 by hand, and students that are cut from a teacher against transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import distilling
import letter_line
import numpy as np
import pytest
import torch
import transformers
from distilling import chances, layer_by_layer, model_of, row_of, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES
from toys import agree, logits_of, prompt

from lineshaft.base.errors import ConfigError
from lineshaft.compress.distil import (
    MAPS,
    Distil,
    Mixture,
    cut,
    cut_config,
    divergence,
    evenly_spaced,
    fresh_maps,
    hidden_error,
    pairs_of,
    softened,
)
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.ops.formats import Integer
from lineshaft.train.objective import Loss, NextToken

DOCUMENTS = [[0, 5, 9, 3, 14, 22, 1], [0, 7, 7, 1], [4], [0, 21, 2, 13, 8, 1]]


def loss_of(objective: Distil, student: Decoder, documents: list[list[int]] = DOCUMENTS) -> Loss:
    with objective.learning(student):
        return objective(student, row_of(documents))


def by_hand(teacher: Decoder, student: Decoder, mixture: Mixture, maps: list[np.ndarray], documents: list[list[int]]) -> float:
    """The whole loss in float64, from each document alone."""
    total, depth = 0.0, teacher.config.num_hidden_layers // student.config.num_hidden_layers
    for document in documents:
        rows, following = len(document) - 1, document[1:]
        (taught, theirs), (said, ours) = layer_by_layer(teacher, document), layer_by_layer(student, document)
        plain = chances(said[:rows], 1)[np.arange(rows), following]
        p, q = chances(taught[:rows], mixture.temperature), chances(said[:rows], mixture.temperature)
        total += (1 - mixture.alpha) * -np.log(plain).sum()
        total += mixture.alpha * mixture.temperature**2 * (p * (np.log(p) - np.log(q))).sum()
        for place, near in enumerate(ours if mixture.hidden_weight else []):
            mapped = near @ maps[place].T if maps else near
            error = ((mapped - theirs[(place + 1) * depth - 1]) ** 2).mean(-1)[:rows].sum()
            total += mixture.hidden_weight * error / len(ours)
    return total


@settings(max_examples=20, deadline=None)
@given(
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    hidden_weight=st.sampled_from([0.0, 0.25, 3.0]),
    width=st.sampled_from([8, 12]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_the_loss_is_the_one_worked_out_by_hand(
    alpha: float, temperature: float, hidden_weight: float, width: int, lengths: list[int]
) -> None:
    documents = [torch.randint(0, letter_line.VOCABULARY, (length,)).tolist() for length in lengths]
    teacher, student = model_of(distilling.shape(4), 1), model_of(distilling.shape(2, width), 2)
    mixture = Mixture(alpha, temperature, hidden_weight)
    objective = Distil(teacher, student, mixture, seed=3)
    loss = loss_of(objective, student, documents)
    maps = [wide(map_JI) for map_JI in objective.maps]
    assert len(maps) == (2 if hidden_weight and width != 12 else 0)
    wanted = by_hand(teacher, student, mixture, maps, documents)
    assert loss.total.item() == pytest.approx(wanted, rel=2e-5, abs=1e-5)
    assert loss.next_token.item() == pytest.approx(NextToken()(student, row_of(documents)).next_token.item(), rel=1e-6)


def test_the_gradient_at_the_logits_is_hintons() -> None:
    """Section 2 of the paper: temperature^2 times 1 / temperature (q - p) for the teacher's part."""
    teacher, student, mixture = model_of(distilling.shape(4), 1), model_of(distilling.shape(2), 2), Mixture(0.7, 3.0)
    kept, plain = [], student.logits
    student.logits = lambda hidden: kept.append(plain(hidden)) or kept[0].retain_grad() or kept[0]  # type: ignore[method-assign]  # listens in
    loss_of(Distil(teacher, student, mixture), student).total.backward()
    place = 0
    for document in DOCUMENTS:
        rows = len(document) - 1
        taught, said = layer_by_layer(teacher, document)[0][:rows], wide(kept[0][place : place + rows])
        right = np.eye(letter_line.VOCABULARY)[document[1:]] if rows else np.zeros((0, letter_line.VOCABULARY))
        wanted = 0.3 * (chances(said, 1) - right) + 0.7 * 3.0 * (chances(said, 3.0) - chances(taught, 3.0))
        np.testing.assert_allclose(wide(kept[0].grad[place : place + rows]), wanted, rtol=1e-4, atol=1e-6)
        assert not kept[0].grad[place + rows].any()  # nothing follows the last token
        place += len(document)


def test_at_a_high_temperature_it_is_half_the_mean_square_of_centred_logits() -> None:
    """Equation 4 of the paper; what the factor temperature^2 is for."""
    one, other = (torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = 1e4**2 * divergence(softened(one, 1e4), softened(other, 1e4))
    differences = (one - one.mean(-1, keepdim=True)) - (other - other.mean(-1, keepdim=True))
    torch.testing.assert_close(found, differences.square().mean(-1) / 2, rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(4)
    taught, near, far, across = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((3, 6), (3, 4), (3, 5), (5, 4)))
    said = torch.randn(3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: divergence(softened(taught, 2.5), softened(logits, 2.5)), said)
    inputs = (near.requires_grad_(), far, across.requires_grad_())
    assert torch.autograd.gradcheck(hidden_error, inputs)
    assert torch.autograd.gradcheck(lambda same: hidden_error(same, far, None), far.clone().requires_grad_())


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.2, 20), scale=st.floats(0.1, 50))
def test_a_divergence_is_never_negative_and_nothing_between_equals(seed: int, temperature: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = scale * torch.randn(2, 4, 11, dtype=torch.float64, generator=generator)
    assert (divergence(softened(one, temperature), softened(other, temperature)) >= -1e-12).all()
    assert not divergence(softened(one, temperature), softened(one + 3.0, temperature)).abs().gt(1e-9).any()
    assert torch.equal(divergence(softened(one, temperature), softened(one, temperature)), torch.zeros(4, dtype=torch.float64))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it() -> None:
    teacher, student = model_of(distilling.shape(3), 1), model_of(distilling.shape(3), 1)
    loss = loss_of(Distil(teacher, student, Mixture(1.0, 2.0, 1.0)), student)
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.next_token.item() > 1
    assert max(parameter.grad.abs().max().item() for parameter in student.parameters()) < 1e-5


def test_the_teacher_gets_no_gradients_and_does_not_count_as_trained() -> None:
    teacher, student = model_of(letter_line.TINY, 1).train(), model_of(distilling.shape(2, 8), 2).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = Distil(teacher, student, Mixture(0.5, 2.0, 1.0))
    with objective.learning(student):
        loss = objective(student, row_of(DOCUMENTS))
        loss.total.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in [*student.parameters(), *objective.maps])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(router.load.any() for router in teacher.routers())


def test_the_teacher_runs_in_its_own_dtype_whatever_the_student_is_trained_in() -> None:
    student = model_of(distilling.shape(2), 2)
    for dtype in (torch.float32, torch.bfloat16):
        teacher = model_of(distilling.shape(4), 1).to(dtype)
        seen, plain = [], teacher.logits
        teacher.logits = lambda hidden, plain=plain, seen=seen: seen.append(plain(hidden)) or seen[-1]  # type: ignore[method-assign]  # listens in
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = loss_of(Distil(teacher, student, Mixture(0.5, 2.0, 1.0)), student)
            assert loss.total.dtype == torch.float32
        assert seen[0].dtype == seen[1].dtype == dtype
        assert torch.equal(*seen)


def test_prediction_layers_learn_as_without_a_teacher() -> None:
    ahead = letter_line.TINY.model_copy(update={"num_nextn_predict_layers": 1})
    teacher, student, batch = model_of(distilling.shape(2), 1), model_of(ahead, 2), row_of(DOCUMENTS)
    plain = NextToken(0.6)(student, batch)
    loss = loss_of(Distil(teacher, student, Mixture(1.0, 2.0, further_weight=0.6)), student)
    alone = model_of(letter_line.TINY, 2)
    alone.load_state_dict({name: student.state_dict()[name] for name in alone.state_dict()})
    taught = loss_of(Distil(teacher, alone, Mixture(1.0, 2.0)), alone)
    assert (loss.total - taught.total).item() == pytest.approx((plain.total - plain.next_token).item(), rel=1e-4)


def test_maps_are_the_students_only_while_it_learns() -> None:
    teacher, student = model_of(distilling.shape(4), 1), model_of(distilling.shape(2, 8), 2)
    names, objective = list(student.state_dict()), Distil(teacher, student, Mixture(hidden_weight=1.0))
    with pytest.raises(AssertionError):
        objective(student, row_of(DOCUMENTS))
    with objective.learning(student):
        assert [name for name in student.state_dict() if name not in names] == [f"{MAPS}.0", f"{MAPS}.1"]
        assert {f"{MAPS}.0", f"{MAPS}.1"} < dict(student.named_parameters()).keys()
    assert list(student.state_dict()) == names


def test_maps_come_from_the_seed_alone() -> None:
    one, same, other = (fresh_maps(8, 300, 2, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])
    assert one[0].shape == (300, 8)
    assert one[0].std().item() == pytest.approx(8**-0.5, rel=0.1)


@given(student=st.integers(1, 40), teacher=st.integers(1, 40))
def test_layers_are_compared_at_the_same_depth(student: int, teacher: int) -> None:
    pairs = pairs_of(student, teacher)
    assert len(pairs) == min(student, teacher)
    assert pairs[-1] == (student - 1, teacher - 1)
    assert all(before[0] < after[0] and before[1] < after[1] for before, after in pairwise(pairs))
    assert all(abs((one + 1) / student - (other + 1) / teacher) < 1 / min(student, teacher) for one, other in pairs)
    assert min(pairs[0]) >= 0


@given(layers=st.integers(1, 64), data=st.data())
def test_kept_layers_are_evenly_spaced(layers: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, layers))
    kept = evenly_spaced(keep, layers)
    gaps = [after - before for before, after in pairwise(kept)]
    assert (len(kept), kept[0]) == (keep, 0)
    assert keep == 1 or kept[-1] == layers - 1
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert all(abs(layer - place * (layers - 1) / max(1, keep - 1)) <= 0.5 for place, layer in enumerate(kept))


def test_half_of_twelve_layers_are_those_of_distilbert() -> None:
    """The layers that its authors' script copies by default; and the ends of what can be asked for."""
    assert evenly_spaced(6, 12) == (0, 2, 4, 7, 9, 11)
    assert (evenly_spaced(1, 12), evenly_spaced(2, 12), evenly_spaced(12, 12)) == ((0,), (0, 11), tuple(range(12)))


@pytest.mark.parametrize(("family", "keep"), [("llama", 3), ("llama", 1), ("deepseek", 3), ("qwen3", 2)])
def test_a_cut_student_is_transformers_model_without_those_layers(family: str, keep: int, tmp_path: Path) -> None:
    theirs = foreign(family)
    theirs.save_pretrained(tmp_path)
    teacher = load_checkpoint(tmp_path)
    student = cut(teacher, keep).eval().requires_grad_(False)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[layer] for layer in evenly_spaced(keep, 6)])
    theirs.config.num_hidden_layers = keep
    with torch.inference_mode():
        wanted = theirs(torch.tensor([prompt(20)]), use_cache=False).logits[0]
    assert agree(logits_of(student, prompt(20)), wanted)
    assert not agree(logits_of(teacher, prompt(20)), wanted)


def foreign(family: str) -> transformers.PreTrainedModel:
    """Six layers with weights large enough that each of them counts."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 6, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    latent = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 10}
    latent |= {"qk_rope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
    latent |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    chosen = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, head_dim=8, tie_word_embeddings=True)),
        "deepseek": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **latent)),
    }
    return chosen[family]().eval()


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_model_can_be_cut_saved_and_loaded(name: str, tmp_path: Path) -> None:
    teacher = Decoder(SHAPES[name])
    teacher.initialise(1)
    (tmp_path / "tokenizer").mkdir()
    for keep in (1, 2):
        student = cut(teacher, keep)
        assert [type(layer.mlp) for layer in student.model.layers[:keep]] == [
            type(teacher.model.layers[layer].mlp) for layer in evenly_spaced(keep, 3)
        ]
        reaches = [SHAPES[name].reach_of(layer) for layer in evenly_spaced(keep, 3)]
        assert [student.config.reach_of(layer) for layer in range(keep)] == reaches
        save_checkpoint(student, tmp_path / str(keep), tmp_path / "tokenizer")
        again = load_checkpoint(tmp_path / str(keep))
        assert again.config == student.config
        with torch.no_grad():
            assert torch.equal(logits_of(again, prompt(20)), logits_of(student.eval(), prompt(20)))


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "deepseek-v3", "deepseek-v3-mtp"])
def test_all_layers_kept_are_the_teacher_and_a_compressed_one_is_decoded(name: str) -> None:
    teacher = Decoder(SHAPES[name])
    teacher.initialise(1)
    whole = cut(teacher, 3)
    assert whole.config == teacher.config
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in whole.state_dict().items())
    for linear in teacher.linears().values():
        linear.recode(Integer(8))
    decoded = cut(teacher, 3)
    for linear in teacher.linears().values():
        linear.dequantise(torch.float32)
    assert {tensor.dtype for tensor in decoded.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in decoded.state_dict().items())
    assert not torch.equal(decoded.model.layers[0].self_attn.o_proj.weight, whole.model.layers[0].self_attn.o_proj.weight)


def test_a_cut_student_shares_no_memory_with_its_teacher() -> None:
    teacher = model_of(distilling.shape(4), 1)
    theirs = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in cut(teacher, 2).state_dict().values()}


@pytest.mark.parametrize("keep", [0, 4])
def test_more_layers_than_there_are_can_not_be_kept(keep: int) -> None:
    with pytest.raises(ConfigError, match=f"keep_layers: {keep} of a teacher's 3 layers can't be kept"):
        cut_config(SHAPES["llama"], keep)
