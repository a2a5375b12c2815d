"""A small byte-level tokenizer for each bundled chat template, ours and as transformers loads it."""

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not find the helpers beside the tests

from conversations import CHATS, described

from lineshaft.data.tokenizer import TokenizerConfig, train
from lineshaft.text.bundled import BUNDLED, source
from lineshaft.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Template name to a folder with tokenizer.json and tokenizer_config.json."""
    words = [text for chat in CHATS.values() for text in described(chat)] * 3
    made = {}
    for name, tokens in BUNDLED.items():
        made[name] = folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_text(train(iter(words), TokenizerConfig(vocab_size=460, chat_template=name)).to_str())
        names = {"bos_token": tokens.bos, "eos_token": tokens.eos, "pad_token": tokens.pad, "chat_template": source(name)}
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    return made


@pytest.fixture(scope="session")
def ours(folders):
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def theirs(folders):
    return {name: PreTrainedTokenizerFast.from_pretrained(folder) for name, folder in folders.items()}
