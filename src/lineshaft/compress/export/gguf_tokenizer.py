"""The tokenizer of a checkpoint in the words of GGUF: byte-level BPE whose way of cutting texts llama.cpp knows by name.

llama.cpp holds the patterns that cut a text before merges as code, under names (its src/llama-vocab.cpp); a file can only name one. So a
tokenizer is exported where its tokenizer.json says exactly what one of these names means; any other would give other tokens in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineshaft.base.errors import BadCheckpoint, UnsupportedModel
from lineshaft.base.terminal import say
from lineshaft.compress.export.gguf_metadata import Value
from lineshaft.model.config import ModelConfig
from lineshaft.text.cuts import CUTS
from lineshaft.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer, byte_alphabet

_GPT2 = "the pattern of GPT-2"
_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    (CUTS["llama3"], True): "llama-bpe",
    (CUTS["llama3"], False): "smaug-bpe",
    (CUTS["qwen2"], False): "qwen2",
    (CUTS["deepseek3"], False): "deepseek-v3",
    ((_GPT2,), False): "gpt-2",
}
"""(patterns one after another, does a word that is a token stay whole whatever the merges say) to llama.cpp's name."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_ENDS = ("eos", "eot", "eom")
"""llama.cpp knows up to three tokens that end an answer."""


def no_vocabulary() -> dict[str, Value]:
    """What a file without a tokenizer says: it runs on token ids alone."""
    return {"tokenizer.ggml.model": "no_vocab"}


def vocabulary(folder: Path, config: ModelConfig) -> dict[str, Value]:
    """Tokens, merges, how texts are cut, special tokens and the chat template.

    Raises UnsupportedModel, naming what GGUF has no words for; BadCheckpoint where the tokenizer does not fit the model.
    """
    tokenizer = Tokenizer.load(folder)
    table = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    model = _byte_level(table)
    tokens, types = _tokens(model["vocab"], table.get("added_tokens") or [], config.vocab_size)
    said: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _cut(table, bool(model.get("ignore_merges"))),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(pair) for pair in model["merges"]],
    }
    said |= _ends(tokenizer, config) | _added_by_itself(folder, table, tokenizer)
    bos = config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
    if bos is not None:
        said["tokenizer.ggml.bos_token_id"] = bos
    if tokenizer.chat_template:
        said["tokenizer.chat_template"] = tokenizer.chat_template
    return said


def _refused(what: str) -> UnsupportedModel:
    told = "llama.cpp would give other tokens; without a tokenizer (--tokenizer none) the file runs on token ids"
    return UnsupportedModel(f"export: {TOKENIZER_FILE}: {what}: {told}")


def _byte_level(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The BPE model, when it is one of bytes and nothing else is done to a text."""
    model: Mapping[str, Any] = table["model"]
    normaliser = table.get("normalizer") or {}
    steps = normaliser.get("normalizers", [normaliser] if normaliser else [])
    wanted = {
        f"a {model.get('type')} model, not byte-level BPE": model.get("type") != "BPE" or bool(model.get("byte_fallback")),
        "merges that are left out at random (dropout)": bool(model.get("dropout")),
        "marks within words (continuing_subword_prefix, end_of_word_suffix)": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "texts that are changed first (normalizer)": any(step["type"] != "NFC" for step in steps),
    }
    for what, present in wanted.items():
        if present:
            raise _refused(what)
    if steps:
        say("export: the tokenizer brings texts into Unicode's normal form C, llama.cpp does not: give it such texts only")
    return model


def _cut(table: Mapping[str, Any], whole_words: bool) -> str:
    """llama.cpp's name for the way in which texts are cut."""
    steps = table.get("pre_tokenizer") or {"type": "none"}
    *splits, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    patterns = tuple(_pattern(step) for step in splits)
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise _refused("a pre_tokenizer that does not end in plain ByteLevel")
    if last.get("use_regex", True):
        patterns += (_GPT2,)
    if (name := _NAMES.get((patterns, whole_words))) is None:
        ours = " and ".join(sorted(CUTS.keys() - {"words"}))
        known = f"known: {', '.join(sorted(_NAMES.values()))}; of tokenizers trained here those with tokenizer.cut {ours}"
        raise _refused(f"texts are cut in a way that llama.cpp has no name for (pre_tokenizer, ignore_merges; {known})")
    return name


def _pattern(step: Mapping[str, Any]) -> str:
    plain = step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step.get("pattern", {})
    if not plain:
        raise _refused(f"a step of pre_tokenizer that llama.cpp has no name for ({step['type']})")
    pattern: str = step["pattern"]["Regex"]
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _merge(pair: str | list[str]) -> str:
    parts = pair.split(" ") if isinstance(pair, str) else pair
    if len(parts) != 2 or any(" " in part or not part for part in parts):
        raise _refused(f"a merge of parts with spaces ({pair!r})")
    return " ".join(parts)


def _tokens(pieces: Mapping[str, int], added: list[Mapping[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Text and type of each id of the model, ids without a token filled up."""
    if trimmed := [token["content"] for token in added if token.get("lstrip") or token.get("rstrip") or token.get("single_word")]:
        raise _refused(f"{trimmed[0]!r} takes the spaces beside it, or stands alone only (lstrip, rstrip, single_word)")
    table = {number: (piece, _NORMAL) for piece, number in pieces.items()}
    table |= {token["id"]: (token["content"], _CONTROL if token.get("special") else _USER_DEFINED) for token in added}
    if max(table) >= size:
        told = f"the tokenizer has token {max(table)}, the model {size} tokens: this {TOKENIZER_FILE} belongs to another"
        raise BadCheckpoint(f"export: {told}")
    letters = byte_alphabet().keys()
    if odd := [piece for piece, kind in table.values() if kind == _NORMAL and not letters >= set(piece)]:
        raise _refused(f"{odd[0]!r} is not spelled in the alphabet of bytes")
    listed = [table.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    texts, kinds = [text for text, _ in listed], [kind for _, kind in listed]
    if len(set(texts)) != size or "" in texts:
        raise _refused("two tokens of one text, or one without any")
    return texts, kinds


def _ends(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """Which tokens end an answer: those of the model, or else the tokenizer's."""
    ends = config.eos_token_ids or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    if not ends:
        raise BadCheckpoint("export: no token ends an answer: say eos_token_id in generation_config.json; llama.cpp would take token 11")
    if len(ends) > len(_ENDS):
        raise _refused(f"{len(ends)} tokens that end an answer, of which llama.cpp can be told {len(_ENDS)} (eos_token_id)")
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in zip(_ENDS, ends, strict=False)}


def _added_by_itself(folder: Path, table: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Value]:
    """Whether the first and last special token come by themselves, as transformers would have it.

    tokenizer_config.json says so, or else the template in tokenizer.json's post_processor.
    """
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    processor = table.get("post_processor") or {}
    steps = [step for step in processor.get("processors", [processor]) if step and step["type"] != "ByteLevel"]
    if any(step["type"] != "TemplateProcessing" for step in steps) or len(steps) > 1:
        raise _refused("a post_processor other than a template")
    parts = [next(iter(part.items())) for part in steps[0]["single"]] if steps else [("Sequence", {})]
    middle = [kind for kind, _ in parts].index("Sequence")
    before, after = ([part["id"] for _, part in side] for side in (parts[:middle], parts[middle + 1 :]))
    if before not in ([], [tokenizer.bos]) or after not in ([], [tokenizer.eos]):
        raise _refused(f"a post_processor that adds {before + after}")
    found: dict[str, Value] = {}
    for name, by_template in (("add_bos_token", bool(before)), ("add_eos_token", bool(after))):
        said = config.get(name)
        found[f"tokenizer.ggml.{name}"] = said if isinstance(said, bool) else by_template
    return found
