"""The scheduler: which tokens of which requests run in the next step.

`plan` decides, the engine runs the plan, `commit` takes the sampled tokens in. A step holds one token for each request
that decodes, and what is left of its token budget is for prompts, in chunks. Requests are served in order of rank: by
priority, then by arrival.

Pages are taken as tokens come. When none is left, the running request of the last rank gives its pages up and waits
again; what it has produced is kept and its keys are computed again later, or found in the prefix cache. A waiting
request is admitted when there are pages for all the tokens it has, so one that has just given way does not come
straight back to be thrown out again.

The first of the running requests never gives way to one of later rank and fits alone, and every step moves it on or
gives some request a token, so every request ends, unless others of better priority never cease.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from lineshaft.base.errors import CacheFull, QueueFull
from lineshaft.sched.admission import Admission, SchedulerConfig
from lineshaft.sched.groups import LayerGroup
from lineshaft.sched.load import Load
from lineshaft.sched.pages import PagePool
from lineshaft.sched.plan import Chunk, Plan
from lineshaft.sched.prefix import extend_keys, longest_match
from lineshaft.sched.request import GONE, Emitted, Request, Score


class Scheduler:
    """Owns all requests and the page pools, one for each layer group."""

    def __init__(self, config: SchedulerConfig, groups: Sequence[LayerGroup], pools: Sequence[PagePool], page_tokens: int) -> None:
        self.config, self.groups, self.pools, self.page_tokens = config, groups, pools, page_tokens
        self.admission = Admission(config)
        self.waiting: list[Request] = []
        """The last is the next to be served."""
        self.running: list[Request] = []
        """In order of rank."""
        self._totals = {"preemptions": 0, "prefix_queried_tokens": 0, "prefix_hit_tokens": 0}

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue a request and its copies. Raises CacheFull when one could not run even alone, QueueFull when too many wait."""
        first = requests[0]
        for group, pool in zip(self.groups, self.pools, strict=True):  # the last token of an answer is never looked back at
            need = group.most_pages(first.limit - 1, self.config.step_tokens, self.page_tokens)
            if need > pool.pages:
                raise CacheFull(need, pool.pages)
        if self.waiting and len(self.waiting) + len(requests) > self.config.max_waiting:  # many copies may come alone
            raise QueueFull(len(self.waiting))
        for request in requests:
            self._wait(request)

    def cancel(self, number: int) -> None:
        """Forget a request and free its pages; an unknown number is one that has ended already."""
        for request in [*self.running, *self.waiting]:
            if request.number == number:
                self._leave(request)
                return

    def plan(self, now: float = 0.0) -> Plan:
        """Decide the next step; takes pages and may preempt, but runs nothing. Empty when there is nothing to do."""
        plan = Plan()
        budget = self._go_on(plan, self.config.step_tokens)
        self._admit(plan, budget, now)
        return plan

    def commit(self, plan: Plan, sampled: Sequence[int], scores: Sequence[Score | None] | None = None) -> list[Emitted]:
        """Record that the plan ran and which token each of `plan.sampling` got; requests that end leave."""
        emitted = []
        place = 0
        page_tokens, groups = self.page_tokens, self.groups
        for chunk in plan.chunks:
            request, last = chunk.request, chunk.last
            request.cached = last
            if last // page_tokens > chunk.first // page_tokens:
                self._publish(request)
                if any(group.forgets for group in groups):
                    self._forget(request)
            if last < len(request.tokens):
                continue
            if request.task == "embed":
                self._leave(request)
                continue
            token, score = sampled[place], None if scores is None else scores[place]
            place += 1
            finish = request.finish_with(token)
            emitted.append(Emitted(request.number, token, finish, score))
            if finish is not None:
                self._leave(request)
        assert place == len(sampled)
        return emitted

    def load_now(self) -> Load:
        """How busy it is."""
        held = max(pool.held / pool.pages for pool in self.pools)
        return Load(len(self.running), len(self.waiting), held, self.admission.limit, **self._totals)

    def check(self) -> None:
        """Pages are held by running requests alone, and by none more often than they say. Tests call this after every move."""
        for place, pool in enumerate(self.pools):
            pool.check(page for request in self.running for page in request.tables[place] if page != GONE)
        assert all(not request.tables and not request.cached and not request.running for request in self.waiting)
        assert sorted(self.running, key=lambda request: request.rank) == self.running
        assert sorted(self.waiting, key=lambda request: request.rank, reverse=True) == self.waiting
        for request in self.running:
            assert request.running
            assert len(request.tokens) < request.limit or request.task == "embed"
            for group, table in zip(self.groups, request.tables, strict=True):
                assert self._pages_for(request.cached) <= len(table) <= self._pages_for(len(request.tokens))
                assert all(table[page] != GONE for page in group.seen_pages(request.cached, self.page_tokens) if page < len(table))

    # -- requests that run ------------------------------------------------------------------------------------------

    def _go_on(self, plan: Plan, budget: int) -> int:
        """The next token of all that decode, then more of the prompts being read. Returns what is left of the budget."""
        reading = []
        chunks, page_tokens = plan.chunks, self.page_tokens
        for request in list(self.running):
            first = request.cached
            if len(request.tokens) - first > 1:
                reading.append(request)
            elif budget <= 0:
                break
            elif (request.settled and first % page_tokens) or self._make_room(plan, request, first + 1):
                chunks.append(Chunk(request, first, first + 1))
                budget -= 1
        for request in reading:
            budget -= self._read(plan, request, budget)
        return budget

    def _read(self, plan: Plan, request: Request, budget: int) -> int:
        """As many of the request's tokens as the budget allows; returns how many."""
        first = request.cached
        last = min(len(request.tokens), first + budget)
        if last <= first or not self._make_room(plan, request, last):
            return 0
        plan.chunks.append(Chunk(request, first, last))
        return last - first

    def _make_room(self, plan: Plan, request: Request, last: int) -> bool:
        """Take pages for the tokens before `last`, from requests of later rank if need be. False when it had to give way itself."""
        if not request.running:
            return False
        for group, pool in enumerate(self.pools):
            while self._lacks(request, group, last) > pool.available:
                victim = self.running[-1]
                self._preempt(plan, victim)
                if victim is request:
                    return False
        for group in range(len(self.pools)):
            self._take(plan, request, group, last)
        request.settled = True
        return True

    def _lacks(self, request: Request, group: int, last: int) -> int:
        missing = self._pages_for(last) - len(request.tables[group])
        return missing + (self._shared_page(request, group) is not None)

    def _shared_page(self, request: Request, group: int) -> int | None:
        """The page that the next token goes into, when it may not be written into."""
        table, place = request.tables[group], request.cached // self.page_tokens
        if request.settled or place >= len(table) or self.pools[group].writable(table[place]):
            return None
        return table[place]

    def _take(self, plan: Plan, request: Request, group: int, last: int) -> None:
        pool, table = self.pools[group], request.tables[group]
        shared = self._shared_page(request, group)
        if shared is not None:
            (own,) = pool.take(1)
            plan.copies.append((group, shared, own))
            table[request.cached // self.page_tokens] = own
            pool.give_back([shared])
        table += pool.take(max(0, self._pages_for(last) - len(table)))

    def _preempt(self, plan: Plan, request: Request) -> None:
        plan.chunks[:] = [chunk for chunk in plan.chunks if chunk.request is not request]
        self.running.remove(request)
        self._release(request)
        self._wait(request)
        self._totals["preemptions"] += 1

    # -- requests that wait -----------------------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: int, now: float) -> None:
        if not self.waiting:
            self.admission.update(len(self.running), 0, 0.0)
            return
        limit = self.admission.update(len(self.running), len(self.waiting), now - self.waiting[-1].arrived)
        while budget > 0 and self.waiting:
            request = self.waiting[-1]
            if not self._place_for(plan, request, limit) or self.waiting[-1] is not request:
                return
            tables, cached = self._beginning(request)
            if not self._fits(plan, request, tables):
                return
            self._start(plan, request, tables, cached)
            budget -= self._read(plan, request, budget)

    def _place_for(self, plan: Plan, request: Request, limit: int) -> bool:
        """May one more run? A request that the limit keeps out takes the place of one of worse priority."""
        if request.parent is not None and not request.parent.running:
            request.parent = None
        if request.parent is not None and request.parent.cached < request.prompt_tokens:
            return False  # the prompt is being read
        if len(self.running) < limit:
            return True
        if self.running[-1].priority > request.priority:
            self._preempt(plan, self.running[-1])
            return True
        return False

    def _beginning(self, request: Request) -> tuple[list[list[int]], int]:
        """Pages that hold the beginning of its text already, for each group, and how many tokens of it they hold."""
        if (parent := request.parent) is not None and not request.reads_all:
            length = request.prompt_tokens - 1  # the last token is run again, for its logits
            found = [self._parents_pages(group, table, length) for group, table in zip(self.groups, parent.tables, strict=True)]
            tables = [table for table in found if table is not None]
            if len(tables) == len(self.groups):
                return tables, length
        if not self.config.prefix_cache or request.reads_all:
            return [[] for _ in self.groups], 0
        tables = longest_match(request, self.groups, self.pools, self.page_tokens)
        return tables, len(tables[0]) * self.page_tokens

    def _parents_pages(self, group: LayerGroup, table: list[int], length: int) -> list[int] | None:
        """The pages of a parent from which token `length` can go on; None when it has given back one that is needed."""
        pages = table[: self._pages_for(length + 1)]
        seen = group.seen_pages(length, self.page_tokens)
        kept = [page if place in seen else GONE for place, page in enumerate(pages)]
        return None if any(kept[place] == GONE for place in seen) else kept

    def _fits(self, plan: Plan, request: Request, tables: Sequence[list[int]]) -> bool:
        """Are there pages for all its tokens, beside those found? Requests of worse priority give way."""
        while True:
            if all(self._need(request, group, found) <= self.pools[group].available for group, found in enumerate(tables)):
                return True
            if not self.running or self.running[-1].priority <= request.priority or self.running[-1] is request.parent:
                return False
            self._preempt(plan, self.running[-1])

    def _need(self, request: Request, group: int, found: Sequence[int]) -> int:
        pool = self.pools[group]
        most = self.groups[group].most_pages(len(request.tokens), self.config.step_tokens, self.page_tokens)
        kept = [page for page in found if page != GONE]
        own = min(most, self._pages_for(len(request.tokens)) - len(found)) + (request.parent is not None)
        return own + sum(pool.is_idle(page) for page in kept)

    def _start(self, plan: Plan, request: Request, tables: list[list[int]], cached: int) -> None:
        self.waiting.pop()
        for table, pool in zip(tables, self.pools, strict=True):
            for page in table:
                if page != GONE:
                    pool.share(page)
        request.tables, request.cached, request.running, request.settled = tables, cached, True, False
        if request.parent is not None:
            request.parent.settled = False
            request.parent = None
        insort(self.running, request, key=lambda other: other.rank)
        if not request.started:
            request.started = True
            plan.started.append((request, cached))
            self._totals["prefix_queried_tokens"] += len(request.tokens)
            self._totals["prefix_hit_tokens"] += cached

    # -- pages ------------------------------------------------------------------------------------------------------

    def _publish(self, request: Request) -> None:
        """Let others find the pages that have become full."""
        full = request.cached // self.page_tokens
        if not self.config.prefix_cache:
            return
        extend_keys(request, full, self.page_tokens)
        for pool, table in zip(self.pools, request.tables, strict=True):
            for place in range(request.published, full):
                if table[place] != GONE:
                    pool.publish(table[place], request.keys[place])
        request.published = full

    def _forget(self, request: Request) -> None:
        """Give back what no later token sees."""
        for group, pool, table in zip(self.groups, self.pools, request.tables, strict=True):
            if group.forgets:
                seen = group.seen_pages(request.cached, self.page_tokens)
                for place, page in enumerate(table):
                    if page != GONE and place not in seen:
                        pool.give_back([page])
                        table[place] = GONE

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=lambda other: (-other.priority, -other.number))

    def _leave(self, request: Request) -> None:
        (self.running if request.running else self.waiting).remove(request)
        self._release(request)

    def _release(self, request: Request) -> None:
        """Give all pages back, the last ones first: of a prefix the end is lost before the beginning."""
        for pool, table in zip(self.pools, request.tables, strict=False):  # a waiting request has no tables
            pool.give_back(page for page in reversed(table) if page != GONE)
        request.tables, request.cached, request.published, request.running, request.settled = [], 0, 0, False, False

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
