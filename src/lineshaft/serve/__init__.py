"""Serving a checkpoint over HTTP: OpenAI's completions and chat, streamed or whole, with probes and metrics.

Read `api` first, the way of a request; then `worker`, the thread that owns the engine; `server` is the process around
both. `ask` is the stage that starts a server, asks it once and records the exchange.
"""
