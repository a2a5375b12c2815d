"""What checking an artifact costs: Store.open (CRC32 of every block and SHA-256) beside reading the same bytes.

    .venv/bin/python benchmarks/verify.py [MIB]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lineshaft.base.machine import machine
from lineshaft.base.store import Draft, Store

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with store.draft("corpus", stage="benchmark", version=1, config={"mib": mib}) as draft:
            assert isinstance(draft, Draft)
            (draft.root / "payload.bin").write_bytes(bytes(range(256)) * (4096 * mib))
        (artifact_id,) = [item.id for item in store.all()]
        path = Path(folder) / "artifacts" / artifact_id / "payload.bin"
        checked, plain = [], []
        for _ in range(REPEATS):
            checked.append(seconds(lambda: store.open(artifact_id)))
            plain.append(seconds(path.read_bytes))
        ours, limit = (mib / 1024 / statistics.median(values) for values in (checked, plain))
        spread = (max(checked) - min(checked)) / statistics.median(checked)
        print(
            f"verified open of {mib} MiB: {ours:.2f} GiB/s, plain read {limit:.2f} GiB/s, ratio {ours / limit:.2f}, "
            f"spread {spread:.0%}, {machine()['processor']}"
        )


if __name__ == "__main__":
    main()
