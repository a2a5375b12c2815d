"""One request from its body to its answer, without a socket: read, made into a job, handed to the worker, worded.

The HTTP interface and the batch mode both go through here, so both give the same answers and the same refusals.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from lineshaft.base.errors import LineshaftError, RequestError, UnknownModel
from lineshaft.sched.request import Ask, Pooled
from lineshaft.serve.answer import Answering, Echo, Telling
from lineshaft.serve.job import Job, Room, chat_job, checked_ids, completion_job, embedding_asks, token_ids
from lineshaft.serve.limits import Limits
from lineshaft.serve.names import Names
from lineshaft.serve.pending import Deadline, Pending
from lineshaft.serve.read import read_chat, read_completion, read_detokenize, read_embedding, read_tokenize, shown
from lineshaft.serve.replies import Detokenized, Embedding, EmbeddingList, EmbeddingUsage, Tokens
from lineshaft.serve.voice import ChatVoice, CompletionVoice, Voice
from lineshaft.serve.wire import Asked
from lineshaft.serve.worker import Worker
from lineshaft.text.tokenizer import Tokenizer

A = TypeVar("A", bound=Asked)

EMBEDDED_AT_ONCE = 16
"""Texts of one request for embeddings that are with the engine at a time, so that one client does not fill the queue."""


class Service:
    """Answers requests for one served model."""

    def __init__(self, worker: Worker, model: str, limits: Limits) -> None:
        self.worker, self.model, self.limits = worker, model, limits
        self._names: tuple[Tokenizer, Names] | None = None

    async def completion(self, body: bytes, arrived: float) -> Pending:
        """Hand in a request for completions. `arrived` is a time of `time.monotonic`. Raises LineshaftError."""
        asked = read_completion(body)
        return await self._begun(asked, completion_job, CompletionVoice, asked.logprobs is not None, arrived)

    async def chat(self, body: bytes, arrived: float) -> Pending:
        """Hand in a request for chat answers. `arrived` is a time of `time.monotonic`. Raises LineshaftError."""
        asked = read_chat(body)
        return await self._begun(asked, chat_job, ChatVoice, bool(asked.logprobs), arrived)

    async def embeddings(self, body: bytes, arrived: float) -> EmbeddingList:
        """Embed texts. `arrived` is a time of `time.monotonic`. Raises LineshaftError."""
        asked = read_embedding(body)
        self._check_model(asked.model)
        served = self.worker.model()
        asks = await asyncio.to_thread(embedding_asks, asked, served.tokenizer, Room(served.engine.context_tokens, self.limits))
        clock = Deadline(arrived, self.limits.request_seconds)
        try:
            found = await clock.keep(self._embedded(asks, arrived))
        finally:
            clock.close()
        if asked.dimensions is not None and asked.dimensions != len(found[0]):
            raise RequestError(f'"dimensions": this model has {len(found[0])} and gives no other number of them', "dimensions")
        as_text = asked.encoding_format == "base64"
        data = [Embedding(place, _base64(numbers) if as_text else numbers) for place, numbers in enumerate(found)]
        tokens = sum(len(ask.prompt) for ask in asks)
        return EmbeddingList(data, self.model, EmbeddingUsage(tokens, tokens))

    async def tokenize(self, body: bytes) -> Tokens:
        """The ids of a text or conversation. Raises LineshaftError."""
        asked = read_tokenize(body)
        self._check_model(asked.model)
        served = self.worker.model()
        ids = await asyncio.to_thread(token_ids, asked, served.tokenizer)
        texts = [served.tokenizer.token_text(number) or "" for number in ids] if asked.return_token_strs else None
        return Tokens(len(ids), served.engine.context_tokens, ids, texts)

    async def detokenize(self, body: bytes) -> Detokenized:
        """The text of ids, that of special tokens with it. Raises LineshaftError."""
        asked = read_detokenize(body)
        self._check_model(asked.model)
        tokenizer = self.worker.model().tokenizer
        ids = checked_ids(asked.tokens, tokenizer, "tokens")
        return Detokenized(await asyncio.to_thread(tokenizer.decode, ids, keep_special=True))

    async def reply(self, path: str, body: bytes) -> msgspec.Struct:
        """The whole answer to what would be a POST to `path`. Raises LineshaftError, also for a request to stream."""
        arrived = time.monotonic()
        if path == "/v1/embeddings":
            return await self.embeddings(body, arrived)
        pending = await (self.chat if path == "/v1/chat/completions" else self.completion)(body, arrived)
        try:
            if pending.streamed:
                raise RequestError('"stream" is not possible in a batch: leave it out', "stream")
            return await pending.whole()
        finally:
            pending.close(self.worker.release)

    async def _begun(
        self,
        asked: A,
        job_for: Callable[[A, Tokenizer, Room], Job],
        voice: Callable[[str, Names | None], Voice],
        logprobs: bool,
        arrived: float,
    ) -> Pending:
        self._check_model(asked.model)
        served = self.worker.model()
        room = Room(served.engine.context_tokens, self.limits)
        job = await asyncio.to_thread(job_for, asked, served.tokenizer, room)  # long prompts take a while
        names = await asyncio.to_thread(self._names_of, served.tokenizer) if logprobs else None
        choices = self._submitted(job, served.tokenizer, arrived)
        return Pending(voice(self.model, names), job, choices, asked, Deadline(arrived, self.limits.request_seconds))

    def _submitted(self, job: Job, tokenizer: Tokenizer, arrived: float) -> list[Answering]:
        """Hand all prompts in, or none."""
        choices: list[Answering] = []
        try:
            for place, ask in enumerate(job.asks):
                echo = Echo(job.echoes[place], ask.prompt, job.silent) if job.echoes else None
                for ticket in self.worker.submit(ask, arrived):
                    choices.append(Answering(ticket, Telling(len(choices), tokenizer, job.stops, echo)))
        except LineshaftError:
            for choice in choices:
                self.worker.release(choice.ticket)
            raise
        return choices

    async def _embedded(self, asks: Sequence[Ask], arrived: float) -> list[list[float]]:
        turns = asyncio.Semaphore(EMBEDDED_AT_ONCE)

        async def one(ask: Ask) -> list[float]:
            async with turns:
                (ticket,) = self.worker.submit(ask, arrived)
                try:
                    told = await ticket.next()
                finally:
                    self.worker.release(ticket)
            assert isinstance(told, Pooled)  # nothing else was asked for
            return told.embedding

        tasks = [asyncio.ensure_future(one(ask)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise UnknownModel(f'the model "{shown(name)}" is not served here; this server has "{self.model}"', "model")

    def _names_of(self, tokenizer: Tokenizer) -> Names:
        kept = self._names
        if kept is None or kept[0] is not tokenizer:  # an engine that failed was loaded again, tokenizer and all
            kept = self._names = (tokenizer, Names(tokenizer))
        return kept[1]


def _base64(numbers: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
