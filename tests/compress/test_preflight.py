"""Compression is refused before weights load when it can't fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from shapes import SHAPES

from lineshaft.base.errors import DoesNotFit
from lineshaft.base.store import Artifact, Store
from lineshaft.compress import stage
from lineshaft.compress.config import CompressConfig
from lineshaft.compress.preflight import Compressing, compress_memory
from lineshaft.compress.stage import COMPRESS, compress
from lineshaft.model import fit
from lineshaft.model.cost import products
from lineshaft.model.decoder import Decoder
from lineshaft.model.memory import Stored

FORMS: list[dict[str, object]] = [{}, {"group": 4}, {"format": "int4", "group": 8}, {"format": "int4", "group": 8, "symmetric": False}]


def fits(name: str, wanted: dict[str, object]) -> bool:
    """Do all widths have groups of 8, where the form needs them?"""
    return "format" not in wanted or not any(item.inputs % 8 for item in products(SHAPES[name]) if item.linear)


@pytest.mark.parametrize(("name", "wanted"), [(name, wanted) for name in SHAPES for wanted in FORMS if fits(name, wanted)])
def test_encoded_bytes_are_those_of_the_tensors(name: str, wanted: dict[str, object]) -> None:
    model = Decoder(SHAPES[name])
    model.initialise(1)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    config = CompressConfig.model_validate(wanted)
    layers = compress(model, config)
    linears = model.linears()
    encoded = sum(tensor.nbytes for layer in layers for tensor in linears[layer].tensors().values())
    phase = compress_memory(Compressing(SHAPES[name], Stored(), config.formats)).phases["reading back"]
    assert (phase["weights as stored"], phase["weights as encoded"]) == (before, encoded)
    assert phase["encoded weights from disk"] == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_the_stage_refuses_before_it_loads(tmp_path: Path, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    source: Artifact = make(store, {"config.json": CONFIG}, kind="checkpoint")
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(stage, "load_checkpoint", lambda folder: pytest.fail("weights were loaded"))
    monkeypatch.setattr(stage.contract, "check_folder", lambda folder: None)
    with pytest.raises(DoesNotFit, match=r"compress: needs .* no option makes it fit, it takes .* more memory"):
        COMPRESS(store, CompressConfig(), checkpoint=source)


CONFIG = b"""{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 4,
"max_position_embeddings": 64, "vocab_size": 61, "rms_norm_eps": 1e-6}"""
