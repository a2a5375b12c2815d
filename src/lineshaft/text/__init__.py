"""Text to tokens and back: the tokenizer, streaming detokenizer and chat templates. Knows no model.

Read `tokenizer` first.
"""
