"""One answer in the making: tokens in, text out, until the model or a stop string ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from lineshaft.sched.request import Emitted
from lineshaft.serve.stops import StopScanner
from lineshaft.serve.wire import FinishReason, Usage
from lineshaft.serve.worker import Ticket
from lineshaft.text.detokenize import Decodes, Detokenizer


class Telling:
    """Turns a request's tokens into the text its client may see."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._scanner = StopScanner(stops)
        self.tokens = 0
        """Tokens taken so far, with the one that ended the answer."""
        self.finish: FinishReason | None = None
        """Why the answer ended; None while it goes on."""

    def push(self, emitted: Emitted) -> str:
        """Take a token. Returns the text that can be shown now; nothing may be pushed once `finish` is set."""
        self.tokens += 1
        # the token that the model ends with says "stop" and nothing else
        text = "" if emitted.finish == "stop" else self._detokenizer.push(emitted.token)
        if emitted.finish:
            text += self._detokenizer.finish()
        shown = self._scanner.push(text)
        if self._scanner.found:
            self.finish = "stop"
        elif emitted.finish:
            self.finish = emitted.finish
            shown += self._scanner.finish()
        return shown

    def usage(self, prompt_tokens: int) -> Usage:
        """The counts so far."""
        return Usage(prompt_tokens, self.tokens, prompt_tokens + self.tokens)


async def texts(ticket: Ticket, telling: Telling) -> AsyncIterator[str]:
    """The answer's text in pieces, "" where a token showed nothing. Raises the error that ended the request."""
    while telling.finish is None:
        told = await ticket.next()
        assert isinstance(told, Emitted)  # nothing else was asked for
        text = telling.push(told)
        ticket.answered = telling.finish is not None
        yield text
