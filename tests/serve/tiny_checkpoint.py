"""A Llama of two layers with random weights and the tests' tokenizer."""

import json

from fake_engine import tokenizer

from lineshaft.model.checkpoint import save_checkpoint
from lineshaft.model.config import GroupedQueryAttention, ModelConfig
from lineshaft.model.decoder import Decoder


def write_tokenizer(folder):
    (folder / "tokenizer.json").write_text(tokenizer()._description)
    fields = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": tokenizer().chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def write_checkpoint(folder, words, seed=0):
    """`words`: the folder with the tokenizer."""
    shape = ModelConfig(
        family="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=128, vocab_size=320,
        attention=GroupedQueryAttention(kind="gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=8),
        bos_token_id=tokenizer().bos_id, eos_token_ids=[tokenizer().eos_id], initializer_range=0.3,
    )  # fmt: skip
    model = Decoder(shape)
    model.initialise(seed)
    save_checkpoint(model, folder, words)
