"""An event loop whose clock jumps to the next timer when nothing is left to read, over real sockets.

Client and server run in the same loop. A delay of the server then lasts exactly as long as it says by the loop's clock,
however busy the machine is, and a minute of load takes a second.
"""

from __future__ import annotations

import asyncio
import selectors

GRACE_SECONDS = 0.0005
"""Real time that bytes on their way over loopback get before the clock jumps."""


class JumpingSelector(selectors.DefaultSelector):
    now = 1000.0

    def select(self, timeout=None):
        if timeout is None:
            return super().select(None)
        events = super().select(0 if timeout <= 0 else GRACE_SECONDS)
        if not events and timeout > 0:
            self.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self):
        return self.jumping.now

    def close(self):
        """asyncio's runner closes the loop that it used; the server needs it a moment longer."""

    def finish(self):
        super().close()
