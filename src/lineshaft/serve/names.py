"""What single tokens are called in answers: their text, or their bytes where these are no whole characters."""

from __future__ import annotations

from lineshaft.base.errors import RequestError, UnsupportedModel
from lineshaft.text.tokenizer import Tokenizer


class Names:
    """Names of a tokenizer's tokens. Making it takes as long as the vocabulary is large: keep it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises RequestError when the tokenizer can't tell what its tokens stand for."""
        self._tokenizer = tokenizer
        try:
            self._bytes = tokenizer.token_bytes()
        except UnsupportedModel as error:
            raise RequestError(f"log-probabilities can't be told for this model: {error}", "logprobs") from None

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, also of a special one; b"" for a number without a token."""
        own = self._bytes[token] if token < len(self._bytes) else b""
        return own or (self._tokenizer.token_text(token) or "").encode()

    def name(self, token: int) -> str:
        """Its text; where its bytes are no text, they are written as OpenAI does: `bytes:\\xe4\\xbb`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
