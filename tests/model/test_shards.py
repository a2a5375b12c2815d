"""Weights in several files: written as transformers does, read from it, and refused where files and index disagree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toys import Theirs

from lineshaft.base.errors import BadCheckpoint, Corrupt
from lineshaft.base.store import Artifact, Store
from lineshaft.model import checkpoint
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint
from lineshaft.model.decoder import Decoder
from lineshaft.model.shards import INDEX, WEIGHTS, read_tensors, weights_bytes, write_tensors

Get = Callable[[str], Theirs]
SMALL = 20_000
"""Bytes a file: several of them for any toy."""


@pytest.fixture
def folder(theirs: Get, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(theirs("deepseek").folder, tmp_path / "checkpoint"))


def shard(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda index: None) -> None:
    """The same weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names, place = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": place}
    edit(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same(a: Decoder, b: Decoder) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in ours.items())


# -- written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v32"])
def test_transformers_loads_our_shards_without_a_difference(name: str, theirs: Get, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(theirs(name).folder), tmp_path, theirs(name).folder, shard_bytes=SMALL)
    assert not (tmp_path / WEIGHTS).exists()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}
    expected = theirs(name).model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v32"])
def test_we_load_the_shards_of_transformers_without_a_difference(name: str, theirs: Get, tmp_path: Path) -> None:
    theirs(name).model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same(load_checkpoint(tmp_path), load_checkpoint(theirs(name).folder))


def test_files_and_index_are_named_as_transformers_names_them(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    save_checkpoint(model, tmp_path / "out", folder, shard_bytes=SMALL)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in model.state_dict().values())}
    assert index["weight_map"] == {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert sorted(index["weight_map"]) == sorted(model.state_dict())


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_a_file_is_as_full_as_it_can_be_and_no_fuller(sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("packed")
    write_tensors(folder, {f"t{number:02d}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}, limit)
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert sorted(name for file in files for name in file) == [f"t{number:02d}" for number in range(len(sizes))]
    fill = [sum(len(tensor) for tensor in file.values()) for file in files]
    assert all(size <= limit or len(file) == 1 for size, file in zip(fill, files, strict=True))
    first = [sizes[int(min(file)[1:])] for file in files]
    assert all(size + following > limit for size, following in zip(fill, first[1:], strict=False)), "it would have fitted"
    assert (folder / INDEX).exists() == (len(files) > 1) == (not (folder / WEIGHTS).exists())


def test_a_checkpoint_written_over_another_leaves_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(folder)
    for shard_bytes in (SMALL, 4 * SMALL, 10**9):
        save_checkpoint(model, tmp_path / "out", folder, shard_bytes=shard_bytes)
        assert same(load_checkpoint(tmp_path / "out"), model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", WEIGHTS]


def test_a_model_may_be_written_over_the_files_it_is_mapped_from(folder: Path) -> None:
    before = {name: tensor.clone() for name, tensor in load_checkpoint(folder).state_dict().items()}
    model = load_checkpoint(folder)
    save_checkpoint(model, folder, folder, shard_bytes=SMALL)
    for seen in (model, load_checkpoint(folder)):
        assert all(torch.equal(tensor, before[name]) for name, tensor in seen.state_dict().items())


@pytest.mark.parametrize("step", ["write_tensors", "write_json"])
def test_what_was_not_finished_can_not_be_loaded(step: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an older checkpoint, too: its config.json goes first."""
    model = load_checkpoint(folder)
    save_checkpoint(model, tmp_path / "out", folder)

    def torn(*_: object) -> None:
        raise OSError("the plug was pulled")

    monkeypatch.setattr(checkpoint, step, torn)
    with pytest.raises(OSError, match="plug"):
        save_checkpoint(model, tmp_path / "out", folder, shard_bytes=SMALL)
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        load_checkpoint(tmp_path / "out")


# -- read --------------------------------------------------------------------------------------------------------


def test_shards_load_as_one_file_does(folder: Path) -> None:
    whole, size = load_checkpoint(folder).state_dict(), weights_bytes(folder)
    shard(folder)
    parts = load_checkpoint(folder).state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert weights_bytes(folder) == size == sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", "a\0b"])
def test_an_index_may_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    shard(folder, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(BadCheckpoint, match="outside the folder"):
        load_checkpoint(folder)


@pytest.mark.parametrize("listed", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map_is_refused(folder: Path, listed: Any) -> None:
    shard(folder, lambda index: index.update(weight_map=listed))
    with pytest.raises(BadCheckpoint, match="weight_map"):
        load_checkpoint(folder)


def test_a_shard_that_is_not_there_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model-00002-of-00002.safetensors"):
        load_checkpoint(folder)


def test_a_shard_that_is_cut_is_named(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=r"model-00002-of-00002.safetensors: can't be read as safetensors"):
        load_checkpoint(folder)


def test_a_tensor_in_another_file_than_the_index_says_is_named(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update({"lm_head.weight": "model-00002-of-00002.safetensors"}))
    with pytest.raises(BadCheckpoint, match=r"00001-of-00002.safetensors: holds lm_head.weight, but .* puts it into model-00002"):
        load_checkpoint(folder)


def test_a_tensor_that_stands_in_two_files_is_named(folder: Path) -> None:
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(1)}, path)
    with pytest.raises(BadCheckpoint, match=r"00002-of-00002.safetensors: holds lm_head.weight, but .* puts it into model-00001"):
        load_checkpoint(folder)


def test_a_tensor_that_the_index_does_not_name_is_named(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].pop("lm_head.weight"))
    with pytest.raises(BadCheckpoint, match=r"holds lm_head.weight, but .* does not name it"):
        load_checkpoint(folder)


def test_a_tensor_that_is_nowhere_is_named(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(BadCheckpoint, match=r"00001-of-00002.safetensors: ghost is not in it"):
        load_checkpoint(folder)


# -- as artifacts ------------------------------------------------------------------------------------------------


def test_shards_are_adopted_and_a_flipped_bit_in_one_is_found(folder: Path, tmp_path: Path, make: Callable[..., Artifact]) -> None:
    save_checkpoint(load_checkpoint(folder), tmp_path / "out", folder, shard_bytes=SMALL)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    made = make(Store(tmp_path / "store"), files, kind="checkpoint").root
    assert same(load_checkpoint(made), load_checkpoint(folder))
    assert weights_bytes(made) == weights_bytes(folder)
    hurt = made / "model-00002-of-{:05d}.safetensors".format(len(list(made.glob("*.safetensors"))))
    raw = bytearray(hurt.read_bytes())
    raw[-1] ^= 1
    hurt.write_bytes(raw)
    with pytest.raises(Corrupt, match=r"model-00002-of-.*: block 0"):
        load_checkpoint(made)


# -- memory ------------------------------------------------------------------------------------------------------

_CHILD = """
import re, sys
from pathlib import Path
import torch
from safetensors import torch as safe
from lineshaft.model import shards
from lineshaft.model.checkpoint import load_checkpoint, save_checkpoint

def mebibytes(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

here = Path(sys.argv[1])
def report(step):
    print(step, mebibytes("RssAnon"), mebibytes("RssFile"), flush=True)

report("start")
model = load_checkpoint(here)
report("loaded")
float(sum(parameter.sum() for parameter in model.parameters()))
report("used")
write = shards.save_file
def watched(*args):
    write(*args)
    report("written")
shards.save_file = watched
save_checkpoint(model, here.with_name("again"), here, shard_bytes=35 << 20)
report("saved")
model = load_checkpoint(here, dtype=torch.bfloat16)
report("cast")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is read from /proc")
def test_weights_are_mapped_until_they_are_used_and_written_without_a_copy(tmp_path: Path) -> None:
    """200 MB in five matrices, in a process of its own; its own memory is what is not backed by a file."""
    config = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 256,
        "intermediate_size": 44_000,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Decoder(checkpoint.load_config(tmp_path / "a"))
    model.load_state_dict({name: torch.rand(tensor.shape) for name, tensor in model.state_dict().items()}, assign=True)
    save_checkpoint(model, tmp_path / "a", tmp_path)
    size = weights_bytes(tmp_path / "a") >> 20
    assert size > 190
    run = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    seen = [(line.split()[0], *map(int, line.split()[1:])) for line in run.stdout.splitlines()]
    own, mapped = {step: anon for step, anon, _ in seen}, {step: file for step, _, file in seen}
    assert own["loaded"] - own["start"] < size // 10
    assert mapped["loaded"] - mapped["start"] < size // 3, "nothing was read yet"
    assert mapped["used"] - mapped["start"] > size // 2, "the measurement sees what is mapped"
    assert max(anon for step, anon, _ in seen if step in ("used", "written", "saved")) - own["start"] < size // 10
    assert len([step for step, *_ in seen if step == "written"]) > 2
    assert own["cast"] - own["saved"] > size // 3, "the measurement sees what is copied"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read_tensors(tmp_path / "again").items())
