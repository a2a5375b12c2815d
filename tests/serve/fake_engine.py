"""A stand-in for the engine that says a prepared text, and a small real tokenizer to say it with."""

import threading
import time
from dataclasses import dataclass, field
from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lineshaft.sched.load import Load
from lineshaft.sched.request import Ask, Emitted, Pooled, PromptScored, Score
from lineshaft.text.tokenizer import Tokenizer

TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}\
{{ raise_exception('no such role here') }}{% endif %}<|{{ message.role }}|>{{ message.content }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TEXT = "价格 is 42 😀, the end. STOP here and go on"
CONTEXT_TOKENS = 256


@cache
def tokenizer():
    """Byte-level, 320 ids, with <bos>, <eos> and a chat template."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=["<bos>", "<eos>"], initial_alphabet=letters, show_progress=False)
    )
    return Tokenizer(library.to_str(), bos="<bos>", eos="<eos>", chat_template=TEMPLATE)


@dataclass
class Request:
    ask: Ask
    said: int = 0

    @property
    def prompt(self):
        return self.ask.prompt

    @property
    def sampling(self):
        return self.ask.sampling


def score(token, most):
    """A likelihood that depends on the token only; the likeliest is the token after it in the vocabulary."""
    logprob = -1 - token % 7 / 8
    return Score(logprob, tuple(((token + 1 + place) % tokenizer().vocab_size, logprob + 0.5 - place / 8) for place in range(most)))


def embedding(prompt):
    """What this engine says of a prompt."""
    return [float(len(prompt)), float(sum(prompt)), 0.1]


@dataclass
class FakeEngine:
    """Says `text` to every request, a token a step, at most `slots` requests at a time."""

    text: str = TEXT
    slots: int = 4
    context_tokens: int = CONTEXT_TOKENS
    step_seconds: float = 0.0
    """Simulated work."""
    gate: threading.Semaphore | None = None
    """When given, each step that has work waits to be let through."""
    refusal: Exception | None = None
    """What `submit` raises."""
    break_at: int | None = None
    """The step that fails."""
    requests: dict[int, Request] = field(default_factory=dict)
    submitted: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Notified after each submit, step and cancel."""
    steps: int = 0

    def __post_init__(self):
        self._script = [*tokenizer().encode(self.text), tokenizer().eos_id]

    @property
    def idle(self):
        return not self.requests

    def submit(self, ask):
        if self.refusal:
            raise self.refusal
        numbers = range(len(self.submitted), len(self.submitted) + ask.copies)
        for number in numbers:
            self.submitted.append(Request(ask))
            self.requests[number] = self.submitted[-1]
        self._notify()
        return list(numbers)

    def cancel(self, request):
        if self.requests.pop(request, None):
            self.cancelled.append(request)
        self._notify()

    def step(self):
        if self.idle:
            return []
        if self.gate:
            self.gate.acquire()
        time.sleep(self.step_seconds)
        self.steps += 1
        if self.steps == self.break_at:
            raise RuntimeError("a kernel failed on secret text")
        told = [event for number, request in list(self.requests.items())[: self.slots] for event in self._work(number, request)]
        self._notify()
        return told

    def load_now(self):
        running = min(self.slots, len(self.requests))
        return Load(running, len(self.requests) - running, running / self.slots, step_began=time.monotonic())

    def wait(self, until):
        """Block until `until(self)` is true."""
        with self.changed:
            assert self.changed.wait_for(lambda: until(self), timeout=10)

    def _work(self, number, request):
        most = request.sampling.logprobs
        if request.ask.task == "embed":
            del self.requests[number]
            yield Pooled(number, embedding(request.prompt))
            return
        if request.ask.task == "score" and not request.said:
            yield PromptScored(number, [None, *(score(token, most) for token in request.prompt[1:])])
        yield self._say(number, request, most)

    def _say(self, number, request, most):
        token = self._script[request.said % len(self._script)]
        request.said += 1
        finish = "length" if request.said == request.sampling.max_tokens else None
        ends = [] if request.sampling.ignore_eos else [tokenizer().eos_id]
        if token in [*ends, *request.sampling.stop_token_ids]:
            finish = "stop"
        if finish:
            del self.requests[number]
        return Emitted(number, token, finish, None if most is None else score(token, most))

    def _notify(self):
        with self.changed:
            self.changed.notify_all()
