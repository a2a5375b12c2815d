"""The tokenizer we train: lossless, equal in every run, and the same thing to transformers."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lineshaft.base.config import load
from lineshaft.base.errors import ConfigError, RequestError
from lineshaft.base.store import Store
from lineshaft.data.tokenizer import TRAIN_TOKENIZER, TokenizerConfig, train
from lineshaft.records.corpus import read_corpus
from lineshaft.text import contract
from lineshaft.text.bundled import BUNDLED, source
from lineshaft.text.chat import render_chat
from lineshaft.text.tokenizer import Tokenizer

ANYTHING = st.text(alphabet=st.characters(codec="utf-8"))
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好, who are you?"},
    {"role": "assistant", "content": "A small model."},
    {"role": "user", "content": "Thanks\n"},
]


@pytest.fixture(scope="module")
def ours(tokenizer) -> Tokenizer:
    return Tokenizer.load(tokenizer.root)


@pytest.fixture(scope="module")
def theirs(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer.root)


def test_special_tokens_come_first(ours: Tokenizer, theirs):
    assert ours.encode_templated("<|bos|><|eos|><|pad|>") == [0, 1, 2]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert theirs.pad_token_id == 2


def test_the_facts_hold(tokenizer, ours: Tokenizer):
    assert tokenizer.manifest.facts["vocab_size"] == ours.vocab_size == 400
    assert tokenizer.manifest.facts["bytes_per_token"] > 1.5


@given(ANYTHING)
def test_no_text_is_unknown_or_changed(ours: Tokenizer, text: str):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    table = ours.token_bytes()
    assert b"".join(table[number] for number in ids) == text.encode()


@given(ANYTHING)
def test_transformers_gives_the_same_ids(ours: Tokenizer, theirs, text: str):
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


def test_transformers_gives_the_same_ids_on_the_corpus(ours: Tokenizer, theirs, corpus):
    texts = [document.text for document in read_corpus(corpus)]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", [True, False])
def test_transformers_renders_the_same_chat(ours: Tokenizer, theirs, prompt: bool):
    assert ours.chat_template is not None
    text = render_chat(ours.chat_template, CHAT, bos=ours.bos, eos=ours.eos, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert ours.encode_templated(text) == ids


def test_a_chat_reads_as_plain_text(ours: Tokenizer):
    assert ours.chat_template is not None
    text = render_chat(ours.chat_template, CHAT, bos=ours.bos, eos=ours.eos, add_generation_prompt=True)
    answered = "Assistant: A small model.<|eos|>\n\n"
    assert text == f"<|bos|>Be brief.\n\nUser: 你好, who are you?\n\n{answered}User: Thanks\n\n\nAssistant:"


def test_an_unknown_role_is_refused(ours: Tokenizer):
    assert ours.chat_template is not None
    with pytest.raises(RequestError, match='role "tool" is unknown: use system, user or assistant'):
        render_chat(ours.chat_template, [{"role": "tool", "content": "x"}], bos="", eos="", add_generation_prompt=True)


def test_only_the_training_part_is_learned_from(tokenizer, corpus):
    from_training = train((item.text for item in read_corpus(corpus, "train")), TokenizerConfig(vocab_size=400))
    stored = json.loads(tokenizer.path("tokenizer.json").read_text())
    assert json.loads(from_training.to_str())["model"] == stored["model"]


def test_merges_stay_inside_words_and_three_digits():
    trained = train(iter(["in 12345678 of the machines, of the machines"] * 50), TokenizerConfig(vocab_size=400))
    found = [token.decode(errors="ignore") for token in Tokenizer(trained.to_str()).token_bytes()]
    assert {" machines", " of", "123", "456"} <= set(found)
    assert not any(" " in token[1:] or sum(map(str.isdigit, token)) > 3 for token in found)


@pytest.mark.parametrize("cut", ["llama3", "qwen2", "deepseek3"])
def test_a_published_way_of_cutting_is_followed_and_loses_nothing(cut: str, tmp_path):
    texts = ["in 12345678 of the machines, 机器学习 of the machines; it's\r\n\tthe end."] * 50
    (tmp_path / "tokenizer.json").write_text(train(iter(texts), load(TokenizerConfig, {"vocab_size": 400, "cut": cut})).to_str())
    ours = Tokenizer((tmp_path / "tokenizer.json").read_text())
    pieces = [ours.token_bytes()[number].decode(errors="ignore") for number in ours.encode(texts[0])]
    assert "".join(pieces) == texts[0]
    digits = [piece for piece in pieces if piece.isdigit()]
    assert digits == (list("12345678") if cut == "qwen2" else ["123", "456", "78"])
    assert ("机器学习" if cut == "deepseek3" else " 机器学习") in pieces
    assert " machines" in pieces
    assert not any("\r" in piece and "\t" in piece for piece in pieces)


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path, corpus, capsys: pytest.CaptureFixture[str]):
    made = TRAIN_TOKENIZER(Store(tmp_path), TokenizerConfig(vocab_size=4000), corpus=corpus)
    assert 259 < made.manifest.facts["vocab_size"] < 4000
    assert f"gives {made.manifest.facts['vocab_size']} of the 4000 tokens" in capsys.readouterr().err


def test_fresh_processes_with_other_threads_and_hash_seeds_give_equal_digests(tmp_path, store: Store, corpus, tokenizer):
    program = (
        "import sys; from lineshaft.base.store import Store; from lineshaft.data.tokenizer import train, TokenizerConfig;"
        "from lineshaft.records.corpus import read_corpus; corpus = Store(sys.argv[1]).open(sys.argv[2]);"
        "texts = (document.text for document in read_corpus(corpus, 'train'));"
        "sys.stdout.write(train(texts, TokenizerConfig(vocab_size=400)).to_str(pretty=True) + '\\n')"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        command = [sys.executable, "-c", program, str(store.root), corpus.id]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=True)
        assert done.stdout == tokenizer.path("tokenizer.json").read_text(encoding="utf-8")


def test_the_chat_contract_is_among_the_facts(tokenizer, ours: Tokenizer):
    assert tokenizer.manifest.facts["contract"] == contract.golden(ours)
    contract.check_folder(tokenizer.root)


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_a_chosen_template_comes_with_its_tokens(name, tmp_path, corpus):
    made = TRAIN_TOKENIZER(Store(tmp_path), TokenizerConfig(vocab_size=400, chat_template=name), corpus=corpus)
    chosen, ours, theirs = BUNDLED[name], Tokenizer.load(made.root), AutoTokenizer.from_pretrained(made.root)
    assert ours.vocab_size == len(theirs) == 400
    assert (ours.bos, ours.eos, ours.bos_id, ours.eos_id) == (chosen.bos, chosen.eos, 0, 1)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.pad_token_id) == (chosen.bos, chosen.eos, chosen.pad, 2)
    assert all(len(ours.encode_templated(token)) == 1 for token in chosen.tokens)
    assert theirs.chat_template == source(name)


def test_a_vocabulary_too_small_for_its_template_is_refused():
    with pytest.raises(ConfigError, match="vocab_size must be at least 266: 256 bytes and the tokens of chat_template chatml"):
        load(TokenizerConfig, {"vocab_size": 265, "chat_template": "chatml"})
