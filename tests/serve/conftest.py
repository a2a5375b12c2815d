"""One server on loopback for the tests that leave nothing behind."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

from fake_engine import FakeEngine, tokenizer
from world import serving

from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder


@pytest.fixture(scope="module")
def world():
    with serving(FakeEngine()) as running:
        yield running


@pytest.fixture
def tiny_model(tmp_path):
    """A Llama of one layer with random weights and the tests' tokenizer, in Hugging Face's layout."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer()._description)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": tokenizer().chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    shape = ModelConfig(
        family="llama", hidden_size=16, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=64, vocab_size=320,
        attention=GroupedQueryAttention(kind="gqa", num_attention_heads=2, num_key_value_heads=1, head_dim=8),
        bos_token_id=tokenizer().bos_id, eos_token_ids=[],
    )  # fmt: skip
    model = Decoder(shape)
    model.initialise(0)
    save_checkpoint(model, folder, folder)
    return folder
