"""INGEST: raw files to a corpus. Read, clean, filter, drop duplicates, split; every drop has a reason and is counted.

    source -> Raw -> clean -> rules -> duplicates -> split -> Document -> corpus

Documents stream through one by one; only the hashes of those kept stay in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from lineshaft.base.config import Config
from lineshaft.base.errors import SourceError
from lineshaft.base.stage import Stage
from lineshaft.base.store import Draft
from lineshaft.base.terminal import bar
from lineshaft.data.clean import STEPS, clean
from lineshaft.data.files import Files
from lineshaft.data.raw import Noticed, Raw, Source
from lineshaft.data.rules import RULES, RulesConfig, Seen, reason_to_drop
from lineshaft.data.stdlib import StandardLibrary
from lineshaft.records.corpus import SPLITS, Document, Split, write_corpus

BAR_STEP = 100
"""Documents between two movements of the bar."""


class IngestConfig(Config):
    """What to read and what to keep."""

    source: str = "stdlib"
    """A file or folder of .txt, .md, .jsonl, .csv or .parquet, or "stdlib": the documentation of the installed Python."""
    text_column: str | None = None
    """Column or key that holds the text in tables and JSON Lines; guessed, and said so, when not given."""
    heldout_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents kept away from training, chosen by the hash of their text, so a document never changes sides."""
    rules: RulesConfig = RulesConfig()
    """Thresholds of the filter."""


@dataclass
class Tally:
    """What happened to the documents."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents by the reason against them."""
    changed: Counter[str] = field(default_factory=Counter)
    """Kept documents by the cleaning steps that repaired something in them."""
    splits: dict[Split, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})

    @property
    def kept(self) -> int:
        """Documents that came through."""
        return self.read - self.dropped.total()

    def reasons(self) -> dict[str, int]:
        """Drops by reason: all rules in their order, then what else happened."""
        names = [*RULES, "duplicate", *sorted(self.dropped.keys() - RULES.keys() - {"duplicate"})]
        return {name: self.dropped[name] for name in names}


def sift(raws: Iterator[Raw], config: IngestConfig, tally: Tally) -> Iterator[Document]:
    """Clean each document and hand on the good ones, in order; counts everything in `tally`."""
    seen = Seen()
    for raw in raws:
        tally.read += 1
        text, changed = clean(raw.text)
        reason = raw.defect or reason_to_drop(text, config.rules) or ("duplicate" if seen.before(text) else None)
        if reason:
            tally.dropped[reason] += 1
            continue
        tally.changed.update(changed)
        document = _document(raw.source, text, config.heldout_share)
        tally.splits[document.split].update({"documents": 1, "bytes": len(text.encode()), "characters": len(text)})
        yield document


def _document(source: str, text: str, heldout_share: float) -> Document:
    digest = hashlib.sha256(text.encode()).digest()
    held_out = int.from_bytes(digest) < int(heldout_share * 2**256)
    return Document(digest.hex()[:16], source, "heldout" if held_out else "train", text)


def _source(config: IngestConfig) -> Source:
    return StandardLibrary() if config.source == "stdlib" else Files(config.source, config.text_column)


def _inputs(config: IngestConfig) -> dict[str, str]:
    return {"source": _source(config).digest()}


def _build(draft: Draft, config: IngestConfig) -> None:
    source, noticed, tally = _source(config), Noticed(), Tally()
    with bar("documents", None) as progress:

        def watched(raws: Iterator[Raw]) -> Iterator[Raw]:
            for raw in raws:
                yield raw
                if tally.read % BAR_STEP == 0:
                    progress.advance(BAR_STEP, note=f"{tally.kept} kept")

        write_corpus(draft, sift(watched(source.read(noticed)), config, tally))
    _check(source, tally)
    draft.facts |= _facts(source, noticed, tally)


def _check(source: Source, tally: Tally) -> None:
    if not tally.read:
        raise SourceError(f"{source.name}: has no documents")
    if not tally.kept:
        reasons = ", ".join(f"{reason} {count}" for reason, count in tally.reasons().items() if count)
        raise SourceError(f"{source.name}: {tally.read} documents read, none kept ({reasons}); give other text or change data.rules")
    for split, counts in tally.splits.items():
        if not counts["documents"]:
            raise SourceError(
                f"{source.name}: {tally.kept} documents kept and none of them fell into the {split} part; "
                f"give more text or {'raise' if split == 'heldout' else 'lower'} data.heldout_share"
            )


def _facts(source: Source, noticed: Noticed, tally: Tally) -> dict[str, Any]:
    return {
        "source": source.name,
        "encodings": dict(sorted(noticed.encodings.items())),
        "text_columns": dict(sorted(noticed.text_columns.items())),
        "skipped_files": dict(sorted(source.skipped.items())),
        "read": tally.read,
        "kept": tally.kept,
        "valid_share": round(tally.kept / tally.read, 6),
        "dropped": tally.reasons(),
        "changed": {step: tally.changed[step] for step in STEPS},
        "splits": {split: dict(counts) for split, counts in tally.splits.items()},
    }


INGEST = Stage(
    name="ingest",
    kind="corpus",
    version=1,
    config=IngestConfig,
    build=_build,
    inputs=_inputs,
    unkeyed=frozenset({"source"}),
)
