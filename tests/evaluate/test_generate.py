"""Prompts out of held-out documents, and the texts out of the tokens that a model wrote."""

from __future__ import annotations

import letter_line
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError
from lineshaft.base.store import Artifact, Store
from lineshaft.evaluate.generate import GenerateConfig, Prompt, generations_of, prompts_of
from lineshaft.evaluate.speed import Answer, SpeedConfig
from lineshaft.evaluate.stage import EVALUATE, EvaluateConfig
from lineshaft.model.attend import PackedCausal
from lineshaft.model.checkpoint import load_checkpoint
from lineshaft.records.generations import read_generations
from lineshaft.records.report import read_report
from lineshaft.records.tokens import TokenStream
from lineshaft.text.tokenizer import Tokenizer, byte_alphabet

SHORT = SpeedConfig(prompt_tokens=8, output_tokens=4, requests=2, batch=2)


@pytest.fixture(scope="module")
def heldout(parents: dict[str, Artifact]) -> TokenStream:
    return TokenStream(parents["tokens"], "heldout")


@pytest.fixture(scope="module")
def letters(parents: dict[str, Artifact]) -> Tokenizer:
    return Tokenizer.load(parents["checkpoint"].root)


def bytewise() -> Tokenizer:
    """A token for each byte: a Chinese character takes three."""
    library = Library(models.BPE(vocab=byte_alphabet(), merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return Tokenizer(library.to_str())


class Listed:
    """A token stream of documents."""

    def __init__(self, documents: list[list[int]]) -> None:
        self._starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
        self._tokens = np.concatenate(documents)

    def __len__(self) -> int:
        return len(self._tokens)

    def starts(self) -> np.ndarray:
        return self._starts

    def read(self, first: int, last: int) -> np.ndarray:
        assert last <= len(self)
        return self._tokens[first:last]


def test_a_prompt_is_the_beginning_of_a_document_and_the_truth_what_follows(heldout: TokenStream, letters: Tokenizer) -> None:
    documents = letter_line.documents(2, 60)
    found = prompts_of(heldout, GenerateConfig(prompts=8, prompt_tokens=5, output_tokens=9), letters)
    assert len(found) == 8
    for prompt in found:
        assert prompt.ids + prompt.truth == documents[prompt.document][:14]
        assert len(prompt.ids) == 5 and letter_line.EOS not in prompt.truth


def test_prompts_are_spread_over_all_documents_that_are_long_enough(heldout: TokenStream, letters: Tokenizer) -> None:
    config = GenerateConfig(prompts=4, prompt_tokens=6, output_tokens=10)
    long = [number for number, document in enumerate(letter_line.documents(2, 60)) if len(document) - 1 >= 16]
    assert [prompt.document for prompt in prompts_of(heldout, config, letters)] == [long[len(long) * place // 4] for place in range(4)]
    every = prompts_of(heldout, config.model_copy(update={"prompts": 4096}), letters)
    assert [prompt.document for prompt in every] == long


@pytest.mark.parametrize("changes", [{"prompt_tokens": 60}, {"prompts": 0}])
def test_without_documents_or_wish_there_are_no_prompts(heldout: TokenStream, letters: Tokenizer, changes: dict[str, int]) -> None:
    assert prompts_of(heldout, GenerateConfig().model_copy(update=changes), letters) == []


def test_one_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'"prompts": one prompt leaves no interval'):
        load(GenerateConfig, {"prompts": 1})


@pytest.mark.parametrize(("size", "shown"), [(6, "模型"), (7, "模型"), (8, "模型"), (9, "模型压"), (2, "\ufffd")])
def test_no_character_is_cut_between_prompt_and_truth(size: int, shown: str) -> None:
    text = "模型压缩之后还能写字"
    stream = Listed([list(text.encode()), list(text.encode())])
    found = prompts_of(stream, GenerateConfig(prompts=2, prompt_tokens=size, output_tokens=7), bytewise())
    told = generations_of(found, [Answer(ids=list("好呀".encode())[:5], finish="length")] * 2, bytewise())
    assert [item.prompt for item in told] == [shown] * 2
    assert told[0].text == "好"  # and not the first two bytes of the next one
    if size > 2:
        assert text.startswith(shown + told[0].truth) and len(told[0].truth) == 2


def test_an_end_token_is_kept_among_the_ids_and_is_no_text(letters: Tokenizer) -> None:
    asked = [Prompt(3, [0, 2], [3, 4])] * 2
    ended, cut = generations_of(asked, [Answer(ids=[5, 6], finish="stop"), Answer(ids=[5, 6], finish="length")], letters)
    assert (ended.text, ended.ids, cut.text, cut.truth, cut.prompt) == ("d", [5, 6], "de", "bc", "a")


@pytest.mark.usefixtures("measured_here")
def test_the_report_keeps_texts_and_ids_of_the_engine(store: Store, parents: dict[str, Artifact], letters: Tokenizer) -> None:
    config = EvaluateConfig(
        sequence_tokens=16, max_tokens=64, speed=SHORT, generate=GenerateConfig(prompts=5, prompt_tokens=6, output_tokens=8)
    )
    made = EVALUATE(store, config, **parents)
    found = read_generations(store.open(made.id))
    assert [item.document for item in found] == sorted({item.document for item in found}) and len(found) == 5
    model = load_checkpoint(parents["checkpoint"].root)
    for item in found:
        row = list(item.prompt_ids)
        while len(row) < 6 + 8 and row[-1] != letter_line.EOS:
            row.append(int(model(*packed(row)).argmax(-1)[-1]))
        assert item.ids == row[6:]
        assert item.text == letters.decode(item.ids) and item.prompt == letters.decode(item.prompt_ids)
    assert made.manifest.facts["tokenizer_sha256"] == parents["tokens"].manifest.facts["tokenizer_sha256"]
    assert "generations.jsonl" in {item.name for item in made.manifest.files}


def packed(row: list[int]) -> tuple[torch.Tensor, torch.Tensor, PackedCausal]:
    return torch.tensor(row), torch.arange(len(row)), PackedCausal(torch.tensor([0]), len(row), len(row))


@pytest.mark.usefixtures("measured_here")
def test_documents_too_short_for_a_text_are_told_in_the_report(store: Store, parents: dict[str, Artifact]) -> None:
    config = EvaluateConfig(
        sequence_tokens=16, max_tokens=64, speed=SHORT, generate=GenerateConfig(prompts=5, prompt_tokens=30, output_tokens=30)
    )
    made = EVALUATE(store, config, **parents)
    assert read_generations(made) == []
    assert read_report(made)[0].notes[-1].startswith("No texts were written: fewer than two held-out documents have 60 tokens")
    silent = EVALUATE(store, config.model_copy(update={"generate": GenerateConfig(prompts=0)}), **parents)
    assert not any("No texts" in note for note in read_report(silent)[0].notes)


def test_texts_longer_than_the_context_are_refused_before_the_scoring(store: Store, parents: dict[str, Artifact]) -> None:
    config = EvaluateConfig(sequence_tokens=16, speed=SHORT, generate=GenerateConfig(prompt_tokens=40, output_tokens=25))
    with pytest.raises(ConfigError, match=r"generate.prompt_tokens \+ generate.output_tokens is 65, more than the model's context of 64"):
        EVALUATE(store, config, **parents)
