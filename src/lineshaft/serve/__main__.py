"""`python -m lineshaft.serve`: a server that belongs to its parent process, as `ask` starts it.

The first line of stdin is a JSON object with the fields of `Orders`; the first line of stdout is `{"port": ...}`. When
stdin ends the parent is done, or dead however it died, and the server stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from lineshaft.base.config import load
from lineshaft.base.errors import LineshaftError
from lineshaft.base.terminal import say
from lineshaft.serve.orders import Orders
from lineshaft.serve.server import run_server


def main() -> int:
    """Serve until the parent or a signal ends it. Returns the exit status."""
    try:
        orders = load(Orders, json.loads(sys.stdin.readline()))
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
        run_server(Path(orders.folder), orders.name, orders.serve, orders.engine, on_listening=_tell_port)
    except LineshaftError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


def _tell_port(port: int) -> None:
    print(json.dumps({"port": port}), flush=True)


def _end_with_parent() -> None:
    while os.read(0, 1 << 16):  # not sys.stdin: its lock, held here, would disturb the end of the process
        continue
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
