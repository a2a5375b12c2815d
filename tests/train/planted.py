"""Artifacts whose chat template has lost a newline since their contract was made; used by the tests of several stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from letter_line import LETTERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lineshaft.base.store import Artifact, Draft, Store
from lineshaft.text import contract

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{{ '\\n' }}{% generation %}{{ (m.content or '') + eos_token }}{% endgeneration %}{% endfor %}"
)
SHOWN = r'conversation "question", token 4: expected 28 "\\n", got 9 "h"'
"""The first difference: `user`, a newline, then the letters of "What": W is not among its 26."""


def with_template(store: Store, kind: Any, base: Path | None = None, *, lost: bool) -> Artifact:
    """A tokenizer of letters and the newline, on top of the files in `base`; with `lost` its template has no newline any more."""
    with store.draft(kind, stage="by_hand", version=9, config={"lost": lost}) as draft:
        assert isinstance(draft, Draft)
        if base:
            shutil.copytree(base, draft.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        _write(draft.root, TEMPLATE)
        draft.facts |= contract.facts_of(draft.root)
        if lost:
            _write(draft.root, TEMPLATE.replace("\\n", ""))
        made = draft.root.parent.name
    return store.open(made)


def _write(folder: Path, template: str) -> None:
    letters = {chr(ord("a") + place): 2 + place for place in range(LETTERS)}
    library = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters, "Ċ": 2 + LETTERS}, merges=[]))
    library.add_special_tokens(["<s>", "</s>"])
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}))
