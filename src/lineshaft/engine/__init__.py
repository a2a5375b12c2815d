"""The engine: many requests at once through the one model, over a paged cache.

Read `loop` (the whole engine is one `step`), then `runner`, `cache`, `attend`, `sampler`; `llm` is the offline API.
"""
