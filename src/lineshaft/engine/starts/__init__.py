"""Starts that are kept: a server's second start works from the native calls that the first one recorded, without importing torch.

Read `keep`, which writes (`places`: where addresses are, `sources`: where weights come from), `format`, what is written, and `reopen`,
which reads (`weights`: their bytes). `key` says what a start hangs on. Why: docs/adr/0015-kept-starts.md.
"""
