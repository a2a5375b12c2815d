"""The offline API: prompts in, answers out, no server.

from lineshaft.engine.llm import LLM
print(LLM("path/to/checkpoint").generate(["Return the"])[0].text)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lineshaft.base.terminal import bar
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.sched.request import Ask, Emitted, Finish, Sampling
from lineshaft.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    token_ids: list[int]
    finish_reason: Finish


class LLM:
    """A model and its tokenizer, answering lists of prompts."""

    def __init__(self, path: Path | str, config: EngineConfig | None = None) -> None:
        self.tokenizer = Tokenizer.load(Path(path))
        self.engine = Engine.load(Path(path), config or EngineConfig())

    def generate(self, prompts: Sequence[str | list[int]], sampling: Sampling | None = None) -> list[Completion]:
        """Answer every prompt (text, or token ids as they are); answers in the order of the prompts.

        Text is preceded by the tokenizer's bos token, as in training. All prompts run together; more than the queue
        holds are fed in as room comes. A prompt that is refused (see Engine.submit) refuses them all.
        """
        sampling = sampling or Sampling()
        pending = list(enumerate(prompt if isinstance(prompt, list) else self._encode(prompt) for prompt in prompts))[::-1]
        answers: list[list[Emitted]] = [[] for _ in prompts]
        place: dict[int, int] = {}
        try:
            with bar("generate", len(prompts)) as progress:
                while pending or not self.engine.idle:
                    while pending and self.engine.load_now().waiting < self.engine.config.scheduler.max_waiting:
                        index, ids = pending.pop()
                        place[self.engine.submit(Ask(ids, sampling))[0]] = index
                    for token in self.engine.step():
                        assert isinstance(token, Emitted)  # nothing else was asked for
                        answers[place[token.request]].append(token)
                        progress.advance(token.finish is not None)
        finally:
            for number in place:  # after an error or Ctrl-C the others must not answer into the next call
                self.engine.cancel(number)
        return [self._completion(answer) for answer in answers]

    def _encode(self, prompt: str) -> list[int]:
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(prompt)

    def _completion(self, answer: list[Emitted]) -> Completion:
        finish = answer[-1].finish
        assert finish is not None
        ids = [token.token for token in answer]
        return Completion(self.tokenizer.decode(ids[:-1] if finish == "stop" else ids), ids, finish)
