"""What compressing a checkpoint needs in memory, told before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lineshaft.base.machine import resident_memory_bytes
from lineshaft.model.config import ModelConfig
from lineshaft.model.cost import Product, products
from lineshaft.model.fit import Verdict, judge
from lineshaft.model.memory import Memory, Stored

CODE_BYTES = 24 << 20
"""Code of PyTorch that comes into memory with the first products, those of the proof (docs/preflight.md)."""


@dataclass(frozen=True)
class Compressing:
    """What is to be compressed, and how."""

    model: ModelConfig
    stored: Stored
    """As the files hold it."""
    formats: tuple[str, ...] = ("int8",)
    """What may be made of linear layers, as model.memory names it. Of several the largest is reckoned for all."""


def compress_memory(given: Compressing) -> Memory:
    """Encoding the largest layer last, with all others encoded; then what was written read back beside it.

    The source is mapped from disk and stays until the end, since what is not encoded still lies there.
    """
    dense = replace(given.stored, format="dense")
    forms = [replace(given.stored, format=name, in_files=None) for name in given.formats]
    made = max(forms, key=lambda form: sum(item.count * form.one(item) for item in _encoded(given)))
    coded = sum(item.count * made.one(item) for item in _encoded(given))
    largest = max((item.size for item in _encoded(given)), default=0)
    # Two float32 copies of a weight while it is rounded, and a third where it is not stored as float32.
    rounding = largest * (8 if given.stored.dtype == "float32" else 12)
    terms = {"weights as stored": dense.total(given.model), "weights as encoded": coded}
    return Memory(
        {
            "encoding": terms | {"one layer while it is rounded": rounding},
            "reading back": terms | {"encoded weights from disk": made.total(given.model)},
        }
    )


def _encoded(given: Compressing) -> list[Product]:
    linear = [item for item in products(given.model) if item.linear]
    return linear if given.model.tie_word_embeddings else linear[:-1]


def judge_compressing(given: Compressing, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes). No option of the stage needs less."""
    return judge("compress", given, (), compress_memory, resident_memory_bytes() + CODE_BYTES, room)
