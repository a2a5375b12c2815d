"""Text to tokens and back: the tokenizer, streaming detokenizer, chat templates and the contract they keep. Knows no model.

Read `tokenizer` first, then `chat` and `contract`.
"""
