"""A server process around a fake engine: `fake_server.py STEP_SECONDS DRAIN_SECONDS`, or `fake_server.py broken`."""

import sys

from fake_engine import FakeEngine
from in_thread import in_thread

from lineshaft.base.errors import BadCheckpoint, LineshaftError
from lineshaft.serve.server import ServeConfig, serve_until_stopped


def load():
    if sys.argv[1] == "broken":
        raise BadCheckpoint("no weights here")
    return FakeEngine(step_seconds=float(sys.argv[1]))


if __name__ == "__main__":
    drain = 5.0 if len(sys.argv) < 3 else float(sys.argv[2])
    try:
        config = ServeConfig(port=0, drain_seconds=drain)
        serve_until_stopped(lambda _: in_thread(load), "fake-1", config, on_listening=lambda port: print(port, flush=True))
    except LineshaftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
