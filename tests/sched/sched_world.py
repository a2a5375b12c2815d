"""Real scheduler and pools around a stand-in for the model, which reads only what the plans put into the pages."""

from __future__ import annotations

from collections.abc import Sequence

from lineshaft.ops.reach import Causal, Reach
from lineshaft.sched.admission import SchedulerConfig
from lineshaft.sched.groups import layer_groups
from lineshaft.sched.pages import PagePool
from lineshaft.sched.plan import Plan
from lineshaft.sched.request import GONE, Emitted, Request, Sampling, Task
from lineshaft.sched.scheduler import Scheduler

STOP = 7


def next_token(seen: Sequence[Sequence[tuple[int, int]]]) -> int:
    """A model of a kind: 0 to 9, from all (place, token) that each layer group sees, so that a lost or wrong one shows at once."""
    return sum((layer + 1) * (place + 1) * (token + 1) for layer, entries in enumerate(seen) for place, token in entries) % 10


def visible(reach: Reach, position: int) -> list[int]:
    return [place for place in range(position + 1) if reach.visible(position, place)]


def alone(prompt: list[int], max_tokens: int, stops: frozenset[int], reaches: Sequence[Reach]) -> list[int]:
    """The answer without a scheduler."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        last = len(tokens) - 1
        tokens.append(next_token([[(place, tokens[place]) for place in visible(reach, last)] for reach in reaches]))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class World:
    """What a test does and looks at. `pages`: of each group."""

    def __init__(self, pages: int, page_tokens: int, reaches: Sequence[Reach] = (Causal(),), **limits: object) -> None:
        self.reaches = list(dict.fromkeys(reaches))
        self.pools = [PagePool(pages) for _ in self.reaches]
        config = SchedulerConfig.model_validate({"max_wait_seconds": 0.0, **limits})  # the clock stands still: nobody waits for more
        self.scheduler = Scheduler(config, layer_groups(self.reaches), self.pools, page_tokens)
        self.page_tokens = page_tokens
        self.slots: list[dict[int, int]] = [{} for _ in self.reaches]
        self.answers: dict[int, list[int]] = {}
        self.wanted: dict[int, list[int]] = {}
        self.stops: dict[int, frozenset[int]] = {}
        self.ends: dict[int, str] = {}
        self.computed = 0
        """Tokens run so far."""

    @property
    def pool(self) -> PagePool:
        return self.pools[0]

    @property
    def preempted(self) -> int:
        return self.scheduler.load_now().preemptions

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        stops: frozenset[int] = frozenset(),
        priority: int = 0,
        copies: int = 1,
        task: Task = "generate",
    ) -> int:
        """The number of the request, of the first when there are copies."""
        first = len(self.wanted) + 1
        sampling = Sampling(max_tokens=max_tokens)
        requests = [Request(first + copy, len(prompt), sampling, stops, list(prompt), task, priority) for copy in range(copies)]
        for request in requests[1:]:
            request.parent = requests[0]
        self.scheduler.submit(requests)
        for request in requests:
            self.answers[request.number], self.stops[request.number] = [], stops
            self.wanted[request.number] = alone(prompt, max_tokens, stops, self.reaches) if task != "embed" else []
        return first

    def step(self, now: float = 0.0) -> list[Emitted]:
        plan = self.scheduler.plan(now)
        self.scheduler.check()
        self._check_plan(plan)
        emitted = self.scheduler.commit(plan, self._run(plan))
        self.scheduler.check()
        for chunk in plan.chunks:
            if chunk.request.task == "embed" and chunk.last == chunk.request.prompt_tokens:
                self.ends[chunk.request.number] = "stop"
        for token in emitted:
            self.answers[token.request].append(token.token)
            if token.finish:
                self.ends[token.request] = token.finish
        return emitted

    def run(self, most_steps: int = 10_000) -> None:
        """Until nothing is left to do, in a bounded number of steps."""
        while self.scheduler.running or self.scheduler.waiting:
            assert most_steps > 0, "starved"
            most_steps -= 1
            self.step()
        assert all(pool.available == pool.pages for pool in self.pools)

    def _check_plan(self, plan: Plan) -> None:
        limits, requests = self.scheduler.config, [chunk.request for chunk in plan.chunks]
        assert plan.tokens <= limits.step_tokens
        assert len(self.scheduler.running) <= limits.max_batch
        assert len({request.number for request in requests}) == len(requests)
        assert all(request in self.scheduler.running for request in requests)
        assert plan.chunks or not (self.scheduler.running or self.scheduler.waiting)
        for chunk in plan.chunks:
            assert chunk.first == chunk.request.cached < chunk.last <= len(chunk.request.tokens)
            assert all(len(table) * self.page_tokens >= chunk.last for table in chunk.request.tables)
        written = [
            (group, chunk.request.tables[group][place // self.page_tokens])
            for chunk in plan.chunks
            for group in range(len(self.pools))
            for place in range(chunk.first, chunk.last)
        ]
        assert all(self.pools[group].writable(page) for group, page in written), "somebody else reads that page"

    def _run(self, plan: Plan) -> list[int]:
        for group, source, target in plan.copies:
            for place in range(self.page_tokens):
                if (entry := self.slots[group].get(source * self.page_tokens + place)) is not None:
                    self.slots[group][target * self.page_tokens + place] = entry
        for chunk in plan.chunks:
            for place in range(chunk.first, chunk.last):
                self.computed += 1
                for group, slots in enumerate(self.slots):
                    slots[self._slot(chunk.request, group, place)] = chunk.request.tokens[place]
        sampled = []
        for chunk in plan.chunks:  # after all have written: a page that two wrote into would show
            if chunk.ends and chunk.request.task != "embed":
                sampled.append(next_token([self._seen(chunk.request, group, chunk.last - 1) for group in range(len(self.pools))]))
        return sampled

    def _seen(self, request: Request, group: int, position: int) -> list[tuple[int, int]]:
        places = visible(self.reaches[group], position)
        return [(place, self.slots[group][self._slot(request, group, place)]) for place in places]

    def _slot(self, request: Request, group: int, place: int) -> int:
        page = request.tables[group][place // self.page_tokens]
        assert page != GONE, "a page that is still seen was given back"
        return page * self.page_tokens + place % self.page_tokens
