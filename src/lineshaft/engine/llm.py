"""The offline API: prompts in, answers out, no server.

from lineshaft.engine.llm import LLM
print(LLM("path/to/checkpoint").generate(["Return the"])[0].text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lineshaft.base.errors import ModelError
from lineshaft.base.terminal import bar
from lineshaft.engine.config import EngineConfig
from lineshaft.engine.loop import Engine
from lineshaft.sched.request import Ask, Emitted, Event, Finish, Pooled, Refused, Sampling, Score
from lineshaft.text.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    token_ids: list[int]
    finish_reason: Finish
    scores: list[Score] | None = None
    """Of each token, when the sampling asks for logprobs."""


class LLM:
    """A model and its tokenizer, answering lists of prompts."""

    def __init__(self, path: Path | str, config: EngineConfig | None = None) -> None:
        """Loads the checkpoint. Raises what `Engine.load` raises."""
        self.tokenizer = Tokenizer.load(Path(path))
        self.engine = Engine.load(Path(path), config or EngineConfig())
        self.engine.cache.get_ready()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Answer every prompt (text, or token ids as they are); answers in the order of the prompts.

        Text is preceded by the tokenizer's bos token, as in training. All prompts run together; more than the queue
        holds are fed in as room comes. A prompt that is refused (see Engine.submit) refuses them all; so does one for which the model
        gives no numbers (ModelError).
        """
        answers: list[list[Emitted]] = [[] for _ in prompts]
        for index, event in self._run("generate", [Ask(self._ids(prompt), sampling or Sampling()) for prompt in prompts]):
            if isinstance(event, Emitted):
                answers[index].append(event)
        return [self._completion(answer) for answer in answers]

    def embed(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """The mean of each prompt's final hidden states, in the order of the prompts."""
        found: dict[int, list[float]] = {}
        for index, event in self._run("embed", [Ask(self._ids(prompt), Sampling(max_tokens=1), "embed") for prompt in prompts]):
            if isinstance(event, Pooled):
                found[index] = event.embedding
        return [found[index] for index in range(len(prompts))]

    def _run(self, label: str, asks: Sequence[Ask]) -> Iterator[tuple[int, Event]]:
        """Everything that the requests are told, with the place of the request."""
        pending, place = list(enumerate(asks))[::-1], dict[int, int]()
        try:
            with bar(label, len(asks)) as progress:
                while pending or not self.engine.idle:
                    while pending and self.engine.load_now().waiting < self.engine.config.scheduler.max_waiting:
                        index, ask = pending.pop()
                        place[self.engine.submit(ask)[0]] = index
                    for event in self.engine.step():
                        if isinstance(event, Refused):
                            raise ModelError(event.message)
                        progress.advance(isinstance(event, Pooled) or (isinstance(event, Emitted) and event.finish is not None))
                        yield place[event.request], event
        finally:
            for number in place:  # after an error or Ctrl-C the others must not answer into the next call
                self.engine.cancel(number)

    def _ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(prompt)

    def _completion(self, answer: list[Emitted]) -> Completion:
        finish = answer[-1].finish
        assert finish is not None
        ids = [token.token for token in answer]
        scores = [token.score for token in answer if token.score is not None]
        return Completion(self.tokenizer.decode(ids[:-1] if finish == "stop" else ids), ids, finish, scores or None)
