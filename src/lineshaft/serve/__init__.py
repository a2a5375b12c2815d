"""Serving a checkpoint over HTTP: OpenAI's and vLLM's endpoints, streamed or whole, with limits, probes and metrics.

Read `service` first, the way of a request without a socket; then `api`, the HTTP around it, and `batch`, the files around it;
then `worker`, which owns the engine; `server` is the process around them. `ask` is the stage that starts a server, asks it
once and records the exchange.
"""
