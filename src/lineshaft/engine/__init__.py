"""The engine: many requests at once through the one model, over a paged cache.

Read `rounds` (the whole engine is one `step`) and `loop`, which makes it around a model; then `runner`, `cache`, `attend`, `sampler`;
`llm` is the offline API.
`starts` is how a second start does without torch.
"""
