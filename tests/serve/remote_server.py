"""A server process whose fake engine has a process of its own: `remote_server.py OPTIONS STALL_SECONDS` (see fake_child.py)."""

import sys
from pathlib import Path

from fake_engine import tokenizer

from lineshaft.base.errors import LineshaftError
from lineshaft.engine.config import EngineConfig
from lineshaft.serve.remote import RemoteEngine
from lineshaft.serve.served import Served
from lineshaft.serve.server import ServeConfig, serve_until_stopped
from lineshaft.serve.spawn import spawn

CHILD = [sys.executable, str(Path(__file__).with_name("fake_child.py")), sys.argv[1]]


async def start(_):
    remote = await RemoteEngine.spawned(Path(), EngineConfig(), float(sys.argv[2]), spawn(CHILD))
    await remote.wait_ready()
    return Served(remote, tokenizer())


if __name__ == "__main__":
    try:
        serve_until_stopped(start, "fake-1", ServeConfig(port=0, drain_seconds=20), on_listening=lambda port: print(port, flush=True))
    except LineshaftError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
