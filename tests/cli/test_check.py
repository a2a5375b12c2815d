"""`lineshaft check`, from folders that hold no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml
from tiny_line import DEEPSEEK, LLAMA, environment, recipe
from typer.testing import CliRunner

from lineshaft.base.errors import ConfigError, LineshaftError
from lineshaft.cli.main import app
from lineshaft.compress import budget_preflight, calibrate_preflight, forecasts
from lineshaft.compress import preflight as compress_preflight
from lineshaft.compress.steps import STEPS
from lineshaft.engine import preflight as engine_preflight
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import attention_flops, cost_of
from lineshaft.model.hf.config import to_hf
from lineshaft.model.operators import ops_used
from lineshaft.ops.isa import library
from lineshaft.ops.table import chosen, steady
from lineshaft.train import preflight as train_preflight

BILLION = {**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128000}
BILLION["attention"] = {"kind": "gqa", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
BILLION["max_position_embeddings"] = 8192

FLOAT32 = ["--sequence-tokens", "256", "--set", "train.loop.precision=float32"]

CACHE = ["--set", "engine.cache_bytes=536870912"]


def check(*args: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *map(str, args)], prog_name="lineshaft", env=environment())
    if isinstance(done.exception, LineshaftError):
        return done.exception.exit_code, str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


@pytest.fixture(autouse=True)
def a_process_of_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test process holds depends on the tests before; it is part of every peak."""
    for task in (budget_preflight, calibrate_preflight, compress_preflight, engine_preflight, train_preflight):
        monkeypatch.setattr(task, "resident_memory_bytes", lambda: 300 << 20)


@pytest.fixture
def billion(tmp_path: Path) -> Path:
    """A Llama of 1.5 billion weights, without a single one of them."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(ModelConfig.model_validate(BILLION), "bfloat16")))
    return tmp_path


def test_everything_that_can_be_known_is_told_for_people(billion: Path) -> None:
    code, told = check(billion, "--memory", "64GiB", *CACHE)
    assert code == 0
    for line in (
        r"model +llama, 1\.5 G parameters, 1\.24 G active",
        r"  int8, groups of 32 +1\.\d GiB",
        r"stored +bfloat16: 2\.8 GiB",
        r"cache a token +64\.0 KiB float32, 32\.0 KiB bfloat16, 16\.\d KiB int8",
        r"a token +2\.47 GFLOP, \d\.\d+ GFLOP at 8192 tokens of context",
        r"serve +peak .* GiB \(running\), 64\.0 GiB can be had",
        r"  cache pages +51\d\.\d MiB",
        r"verdict +fits",
        r"kernels +\d+ of \d+ ops have one of their own on cpu.*",
    ):
        assert re.search(f"^{line}$", told, re.MULTILINE), (line, told)


def test_the_json_holds_the_exact_figures(billion: Path) -> None:
    code, told = check(billion, "--memory", "64GiB", "--context", "100", "--json")
    config, shown = ModelConfig.model_validate(BILLION), json.loads(told)
    cost = cost_of(config)
    assert code == 0
    assert shown["parameters"] == cost.parameters
    assert shown["kv_bytes_per_token"]["bfloat16"] == 2 * cost.kv_numbers_per_token
    assert shown["flops_per_token_at_context"] == cost.flops_per_token + attention_flops(config, 100) - attention_flops(config, 99)
    assert shown["peak_bytes"] == sum(shown["memory"].values())
    assert (shown["context"], shown["fits"], shown["change"]) == (100, True, [])
    with steady():
        origins = chosen("cpu")
    assert shown["kernels"] == {op: origins[op] for op in ops_used(config, "dense", "serve", library() is not None)}


@pytest.mark.skipif(library() is None, reason="no native kernels here")
def test_a_cache_in_8_bits_is_counted_and_refused_where_nothing_reads_it(billion: Path) -> None:
    whole, half = (
        json.loads(check(billion, "--memory", "64GiB", "--batch", "4", "--set", "engine.cache_bytes=60000000000",
                         "--set", f"engine.cache_dtype={held}", "--json")[1])
        for held in ("auto", "int8")
    )  # fmt: skip
    assert half["memory"]["cache pages"] / whole["memory"]["cache pages"] == 66 / 128
    assert half["kv_bytes_per_token"]["int8"] == 16 * 2 * 8 * 66
    assert set(half["kernels"]) - set(whole["kernels"]) == {"coded_attention", "write_codes"}
    code, told = check(billion, "--set", "engine.cache_dtype=int8", "--set", "engine.batch_invariant=false")
    assert code == ConfigError.exit_code
    assert "need engine.batch_invariant=true" in told


def short_of(peak: int, mebibytes: int) -> str:
    """Room that so much is missing from."""
    return str(peak - (mebibytes << 20))


@pytest.mark.parametrize(
    ("options", "missing", "change"),
    [
        (CACHE, 100, "engine.cache_bytes="),
        (CACHE, 450, "compress it to int8 first"),
        (["--task", "train", "--rows", "64", *FLOAT32], 1000, "rows=32 with loop.accumulate=2"),
        (["--task", "compress"], 10, "no option makes it fit"),
        (["--task", "compress", "--set", "compress.step=awq"], 10, "sequences=32"),
        (["--task", "compress", "--set", "compress.step=qat"], 1000, "rows="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_does_not_fit_names_a_change_and_ends_with_status_8(billion: Path, options: list[str], missing: int, change: str) -> None:
    peak = json.loads(check(billion, *options, "--memory", "999GiB", "--json")[1])["peak_bytes"]
    code, told = check(billion, *options, "--memory", short_of(peak, missing))
    assert code == 8
    assert re.search(rf"^verdict +does not fit\n  change +{re.escape(change)}", told, re.MULTILINE), told


def test_the_change_that_is_named_makes_it_fit(billion: Path) -> None:
    peak = json.loads(check(billion, *CACHE, "--memory", "999GiB", "--json")[1])["peak_bytes"]
    room = short_of(peak, 150)
    code, told = check(billion, *CACHE, "--memory", room, "--json")
    (change,) = json.loads(told)["change"]
    assert code == 8
    assert check(billion, "--memory", room, "--set", change)[0] == 0


def test_a_format_that_the_checkpoint_does_not_have_yet_can_be_tried(billion: Path) -> None:
    shown = json.loads(check(billion, "--memory", "64GiB", "--format", "int8-32", "--json")[1])
    assert shown["stored"]["bytes"] == shown["bytes"]["int8, groups of 32"]
    assert ("packed_linear" if library() else "linear_int") in shown["kernels"]
    smaller = json.loads(check(billion, "--memory", "64GiB", "--format", "int4-32-zeros-a8", "--json")[1])
    assert smaller["stored"]["bytes"] < shown["stored"]["bytes"]
    assert ("packed_linear" if library() else "linear_int_a8") in smaller["kernels"]
    code, told = check(billion, "--format", "int8-zeros")
    assert code == 2
    assert '--format "int8-zeros": unknown; one of dense, int8, int8-32, int4-32, fp8' in told
    assert json.loads(check(billion, "--memory", "64GiB", "--dtype", "float32", "--json")[1])["stored"]["bytes"] == 4 * shown["parameters"]


STEP_NEEDS = {"budget": "compress.bits=5", "prune": "compress.channels=0.2", "distil": "compress.keep_layers=2"}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_compression_can_be_checked(billion: Path, step: str) -> None:
    needs = ["--set", STEP_NEEDS[step]] if step in STEP_NEEDS else []
    asked = ["--task", "compress", "--set", f"compress.step={step}", *needs]
    shown = json.loads(check(billion, *asked, "--memory", "999GiB", "--json")[1])
    assert (shown["task"], shown["fits"]) == ("compress", True)
    assert shown["peak_bytes"] == sum(shown["memory"].values()) > 320 << 20
    assert check(billion, *asked, "--memory", str(shown["peak_bytes"] - 1))[0] == 8


def test_every_step_has_a_forecast_and_what_is_none_is_told(billion: Path) -> None:
    assert forecasts.FORECASTS.keys() == STEPS.keys()
    code, told = check(billion, "--task", "compress", "--set", "compress.step=shrink")
    assert (code, "one of round, gptq, awq, smooth, static, budget" in told) == (2, True)


def test_kernels_are_those_of_what_comes_of_the_step(billion: Path) -> None:
    shown = {
        given: json.loads(check(billion, "--task", "compress", "--memory", "999GiB", "--set", given, "--json")[1])["kernels"]
        for given in ("compress.step=smooth", "compress.step=awq")
    }
    assert shown["compress.step=smooth"].keys() == json.loads(check(billion, "--memory", "999GiB", "--json")[1])["kernels"].keys()
    as_int4 = check(billion, "--memory", "999GiB", "--format", "int4-128", "--json")[1]
    assert shown["compress.step=awq"].keys() == json.loads(as_int4)["kernels"].keys()


def test_a_recipe_is_checked_with_its_own_rows(tmp_path: Path) -> None:
    table: dict[str, Any] = recipe(tmp_path / "texts")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(table))
    shown = json.loads(check(tmp_path / "tiny.yaml", "--task", "train", "--json")[1])
    assert shown["parameters"] == cost_of(ModelConfig.model_validate(DEEPSEEK | {"vocab_size": 300})).parameters
    assert (shown["context"], f"activations of {2 * 32} tokens" in shown["memory"]) == (32, True)


def test_a_model_described_in_yaml_is_enough(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(BILLION))
    shown = json.loads(check(tmp_path / "model.yaml", "--memory", "64GiB", "--json")[1])
    assert shown["parameters"] == cost_of(ModelConfig.model_validate(BILLION)).parameters


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--memory", "lots"], 2, "write it as 16GiB"),
        (["--format", "int3"], 2, '"int3": unknown'),
        (["--dtype", "float8"], 2, '"float8": unknown'),
        (["--set", "server.port=1"], 2, "begin with engine., train. or compress."),
        (["--set", "engine.cache_byte=1"], 2, "did you mean"),
        (["--set", "engine.cache_bytes=1"], 2, "less than one page"),
    ],
)
def test_wrong_options_are_told_in_words(billion: Path, options: list[str], code: int, told: str) -> None:
    got, output = check(billion, *options)
    assert got == code
    assert told in output


def test_a_family_that_is_not_supported_is_refused_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    code, told = check(tmp_path)
    assert code == 5
    assert '"mamba"' in told


def test_serving_is_refused_with_the_same_words_before_any_weight_is_read(tmp_path: Path) -> None:
    large = ModelConfig.model_validate({**BILLION, "num_hidden_layers": 30, "intermediate_size": 200 * 8192})  # few and wide layers
    (tmp_path / "config.json").write_text(json.dumps(to_hf(large, "bfloat16")))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"], env=environment())
    assert isinstance(done.exception, LineshaftError)
    assert done.exception.exit_code == 8
    assert re.search(r"serve: needs .* can be had; smallest change that fits: no option makes it fit", str(done.exception))
