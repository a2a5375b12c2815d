"""How much of the cache holds nothing: pages against one stretch of the longest length for each request (row E04)."""

from __future__ import annotations

import random

from sched_world import World

PAGE, LONGEST = 16, 2048


def lengths() -> list[tuple[int, int]]:
    """(prompt, answer) of 60 requests, most of some hundred tokens, few long: as chats are."""
    luck = random.Random(4)
    drawn = [int(luck.lognormvariate(5.9, 0.7)) for _ in range(60)]
    return [(max(16, min(total, LONGEST) * 3 // 4), max(4, min(total, LONGEST) // 4)) for total in drawn]


def test_pages_waste_at_most_4_percent_where_stretches_waste_60() -> None:
    world = World(pages=4000, page_tokens=PAGE, max_batch=16, start_batch=16, step_tokens=512, prefix_cache=False)
    for number, (prompt, answer) in enumerate(lengths()):
        world.submit([number % 10] * prompt, max_tokens=answer)
    used, paged, stretched = 0, 0, 0
    while world.scheduler.running or world.scheduler.waiting:
        plan = world.scheduler.plan(0.0)
        world.scheduler.commit(plan, [0 for _ in plan.sampling])
        running = world.scheduler.running
        used += sum(request.cached for request in running)
        paged += sum(len(request.tables[0]) for request in running) * PAGE
        stretched += len(running) * LONGEST
    print(f"waste: {1 - used / paged:.1%} in pages of {PAGE}, {1 - used / stretched:.1%} in stretches of {LONGEST}")
    assert 1 - used / paged <= 0.04
    assert 1 - used / stretched >= 0.60
