"""The server refuses a checkpoint whose chat template or tokenizer is not the one it was trained with."""

import json
import subprocess
import sys

import pytest
from fake_engine import tokenizer

from lineshaft.base.store import Store
from lineshaft.engine.config import EngineConfig
from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder
from lineshaft.serve.orders import Orders
from lineshaft.serve.server import ServeConfig
from lineshaft.text import contract

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + '\\n' + (m.content or '') + '\\n' }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A Llama of one layer with the template."""
    made = tmp_path / "hf"
    made.mkdir()
    write_tokenizer(made, TEMPLATE)
    shape = ModelConfig(
        family="llama", hidden_size=16, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=64, vocab_size=320,
        attention=GroupedQueryAttention(kind="gqa", num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        bos_token_id=tokenizer().bos_id, eos_token_ids=[tokenizer().eos_id],
    )  # fmt: skip
    model = Decoder(shape)
    model.initialise(0)
    save_checkpoint(model, made, made)
    return made


@pytest.fixture
def checkpoint(folder, tmp_path):
    store = Store(tmp_path / "store")
    with store.draft("checkpoint", stage="by_hand", version=1, config={}) as draft:
        for path in folder.iterdir():
            (draft.root / path.name).write_bytes(path.read_bytes())
        draft.facts |= contract.facts_of(draft.root)
    return next(store.open(item.id) for item in store.all())


def write_tokenizer(folder, template):
    (folder / "tokenizer.json").write_text(tokenizer()._description)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}))


def served(folder):
    """Exit status and stderr of a server that is left alone once it is ready, or could not become so."""
    orders = Orders(folder=str(folder), name="x", serve=ServeConfig(port=0), engine=EngineConfig(cache_bytes=1 << 20))
    with subprocess.Popen(
        [sys.executable, "-m", "lineshaft.serve"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdin.write(orders.model_dump_json() + "\n")
        child.stdin.flush()
        told = []
        for line in child.stderr:
            told.append(line)
            if "ready in" in line:
                child.stdin.close()
        return child.wait(60), "".join(told)


def test_a_newline_that_was_changed_ends_the_server_with_the_first_token_that_differs(checkpoint):
    write_tokenizer(checkpoint.root, TEMPLATE.replace(r"m.role + '\n'", "m.role + ' '"))
    status, told = served(checkpoint.root)
    assert status == 5
    assert f"error: {checkpoint.id}: the tokenizer or chat template is not the one it was made with: " in told
    assert 'conversation "question", token 5: expected ' in told and r'"\n", got' in told
    assert "Traceback" not in told and "ready in" not in told


def test_a_kept_contract_is_no_word_lost_about(checkpoint):
    status, told = served(checkpoint.root)
    assert status == 0
    assert "ready in" in told and "contract" not in told


def test_a_folder_from_elsewhere_is_served_with_a_word_about_it(folder):
    status, told = served(folder)
    assert status == 0
    assert "ready in" in told and "no artifact, so there is no chat contract" in told
