"""The one model definition that trainer, compressor and engine use.

Read `config`, then `decoder`, then what it is put together from: `attend`, `gqa`, `mla`, `ffn`, `moe`, `linear`.
"""
