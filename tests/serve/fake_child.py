"""An engine process around a fake engine: `fake_child.py OPTIONS`; OPTIONS is JSON with fields of FakeEngine, or "loading"."""

import json
import os
import signal
import sys
import threading

from fake_engine import FakeEngine

from lineshaft.base.errors import BadCheckpoint
from lineshaft.serve import child
from lineshaft.serve.frames import Ready


def load(_):
    options = json.loads(sys.argv[1])
    match options.pop("loading", None):
        case "broken":
            raise BadCheckpoint("no weights here")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "endless":
            threading.Event().wait()
    engine = FakeEngine(**options)
    return engine, Ready(engine.context_tokens, 0, 0.0, 0.0, [])


if __name__ == "__main__":
    sys.exit(child.main(load, lambda: None))
