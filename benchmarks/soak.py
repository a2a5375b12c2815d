"""Minutes of mixed load with hang-ups on a real server: does its memory stay flat, are all pages free at the end, did anything go wrong?

    .venv/bin/python benchmarks/soak.py CHECKPOINT_FOLDER [--minutes 15] [--clients 16] [--cache-bytes 33554432] [--seed 0]

Clients ask for whole and streamed answers to short and long prompts, some with a common beginning, and hang up in the middle, before
the first token, or send what must be refused. Exits with 1 when memory of either process grew by more than 2 % after the first fifth of
the time, when pages or requests are left at the end, or when an answer was not what was asked for. The cache is small by default,
so that all of it has been touched, and requests give way to each other, before memory is looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from pathlib import Path

import aiohttp

from lineshaft.base.machine import machine

GROWTH = 0.02
SAMPLE_S = 2.0
TEXT = "The list is sorted in place and nothing is returned; equal items keep their order, which is what makes a sort stable. " * 8


def body(model: str, chance: random.Random) -> dict[str, object]:
    start = 0 if chance.random() < 0.3 else chance.randrange(200)  # some share a prefix
    prompt = TEXT[start : start + chance.choice((5, 40, 200, 600))]
    fields: dict[str, object] = {"model": model, "prompt": prompt, "max_tokens": chance.choice((1, 8, 32, 64)), "ignore_eos": True}
    return fields | {"stream": chance.random() < 0.6, "temperature": chance.choice((0, 1)), "seed": chance.randrange(1000)}


async def one(session: aiohttp.ClientSession, url: str, model: str, chance: random.Random) -> str:
    """Ask once; returns how it went."""
    fields, kind = body(model, chance), chance.random()
    if kind < 0.05:
        async with session.post(f"{url}/v1/completions", json=fields | {"temperature": -1}) as answer:
            return "refused as it should be" if answer.status == 400 else f"UNEXPECTED status {answer.status} for a bad field"
    patience = chance.choice((0.005, 0.05, 0.2)) if kind < 0.3 else None
    try:
        async with asyncio.timeout(patience), session.post(f"{url}/v1/completions", json=fields) as answer:
            text = await answer.read()
    except TimeoutError:
        return "hung up"
    if answer.status != 200:
        return f"UNEXPECTED status {answer.status}: {text.decode()[:200]}"
    whole = (
        b'"finish_reason":"length"' in text and b'"error":{' not in text and (not fields["stream"] or text.endswith(b"data: [DONE]\n\n"))
    )
    return "answered" if whole else f"UNEXPECTED end: {text.decode()[-200:]}"


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as answer:
        lines = [line for line in (await answer.text()).splitlines() if not line.startswith("#")]
    return {re.sub(r'model_name="[^"]*",?', "", name): float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def load(
    session: aiohttp.ClientSession, url: str, model: str, args: argparse.Namespace
) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Load for the whole time. Returns how requests went and the resident bytes of (front, engine), sampled."""
    ends, until, memory = Counter[str](), time.monotonic() + 60 * args.minutes, []

    async def client(number: int) -> None:
        chance = random.Random(args.seed * 1000 + number)
        while time.monotonic() < until:
            ends[await one(session, url, model, chance)] += 1

    clients = [asyncio.create_task(client(number)) for number in range(args.clients)]
    while not all(task.done() for task in clients):
        now = await metrics(session, url)
        memory.append((now['lineshaft:resident_memory_bytes{process="front"}'], now['lineshaft:resident_memory_bytes{process="engine"}']))
        await asyncio.wait(clients, timeout=SAMPLE_S)
    await asyncio.gather(*clients)
    return ends, memory


async def settled(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What is left two seconds after the last request."""
    gauges = ("vllm:num_requests_running{}", "vllm:num_requests_waiting{}", "vllm:kv_cache_usage_perc{}")
    for _ in range(100):
        now = await metrics(session, url)
        left = {name: now[name] for name in gauges}
        if not any(left.values()):
            break
        await asyncio.sleep(0.02)
    wrong = {name: value for name, value in now.items() if name.startswith("lineshaft:engine_restarts") or 'reason="error"' in name}
    return {name: value for name, value in (left | wrong).items() if value}


async def run(args: argparse.Namespace) -> bool:
    command = ["-m", "lineshaft.cli.start", "serve", str(args.folder), "--port", "0", "--set", f"engine.cache_bytes={args.cache_bytes}"]
    server = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=PIPE)
    assert server.stderr
    url, told = "", []
    while not told or not told[-1].startswith("ready in"):
        told.append((await server.stderr.readline()).decode())
        assert told[-1], told
        url = found[1] if (found := re.match(r"listening on (\S+)", told[-1])) else url
    log = asyncio.create_task(server.stderr.read())
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            ends, memory = await load(session, url, args.folder.resolve().name, args)
            left = await settled(session, url)
    finally:
        server.terminate()
        status = await server.wait()
    complaints = (await log).decode()
    return report(args, ends, memory, left, status, complaints)


def report(
    args: argparse.Namespace, ends: Counter[str], memory: list[tuple[float, float]], left: dict[str, float], status: int, log: str
) -> bool:
    flat = memory[len(memory) // 5 :]
    tenth = max(1, len(flat) // 8)
    growth = [
        statistics.median(sample[process] for sample in flat[-tenth:]) / statistics.median(sample[process] for sample in flat[:tenth]) - 1
        for process in (0, 1)
    ]
    unexpected = {how: count for how, count in ends.items() if how.startswith("UNEXPECTED")}
    good = not left and not unexpected and status == 0 and max(growth) <= GROWTH
    about, usual = machine(), {how: count for how, count in sorted(ends.items()) if how not in unexpected}
    print(
        f"soak {args.minutes:g} min, {args.clients} clients: {json.dumps(usual)}, unexpected {json.dumps(unexpected)}, "
        f"left {json.dumps(left)}, "
        f"memory front {flat[-1][0] / 1e6:.1f} MB ({growth[0]:+.2%}), engine {flat[-1][1] / 1e6:.1f} MB ({growth[1]:+.2%}), "
        f"exit {status}, {'good' if good else 'BAD'}; torch {about['torch']}, {about['cores']} cores, {about['processor']}"
    )
    if not good and log:
        print(log[-3000:], file=sys.stderr)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--cache-bytes", type=int, default=32 << 20)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
