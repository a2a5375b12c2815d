"""Names of modules and tensors: ours, and those in the files of a family, where the two differ.

They do for Mixtral alone. Its published files, and those that transformers writes, say

    model.layers.L.block_sparse_moe.gate.weight            ours: model.layers.L.mlp.gate.weight
    model.layers.L.block_sparse_moe.experts.E.w1.weight    ours: model.layers.L.mlp.experts.E.gate_proj.weight
    ... w3, w2                                             ours: ... up_proj, down_proj

Works on names of tensors, of modules, and in lists such as `ignore` of a quantization_config.
"""

from __future__ import annotations

from collections.abc import Iterable

from lineshaft.model.config import Family, ModelConfig

_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Exchanged, not only replaced: so every name has one partner, and a file that says `mlp` is not taken for one that is right.
_EXCHANGED = _MIXTRAL | {theirs: ours for ours, theirs in _MIXTRAL.items()}


def to_file(family: Family, ours: str) -> str:
    """The name in a checkpoint's files for a name of our modules."""
    if family != "mixtral" or not ours.startswith("model.layers."):
        return ours
    return ".".join(_EXCHANGED.get(part, part) for part in ours.split("."))


def from_file(family: Family, theirs: str) -> str:
    """Our name for a name in a checkpoint's files."""
    return to_file(family, theirs)  # an exchange is its own way back


def shared_copies(config: ModelConfig, ours: Iterable[str]) -> dict[str, str]:
    """Name of a copy to the name it copies, for the tensors or modules of embedding and head among `ours`.

    DeepSeek's files hold both again in each layer for multi-token prediction, and other engines look for them there.
    """
    names = list(ours)
    found: dict[str, str] = {}
    heads = ("model.embed_tokens", "lm_head") if config.tie_word_embeddings else ("lm_head",)
    for layer in range(config.num_hidden_layers, config.all_layers):
        for original, copy in (("model.embed_tokens", "embed_tokens"), *((head, "shared_head.head") for head in heads)):
            same = [name for name in names if name == original or name.startswith(f"{original}.")]
            found |= {f"model.layers.{layer}.{copy}{name.removeprefix(original)}": name for name in same}
    return found
