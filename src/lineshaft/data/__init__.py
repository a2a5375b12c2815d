"""The data shop: raw files to a corpus, a corpus to a tokenizer, both to token shards.

Read `ingest` first: it is the whole way from a raw document to a kept one. `files` and `stdlib` read, `clean` repairs,
`rules` refuses; `tokenizer` and `tokens` are the two stages behind it.
"""
