"""The contract of tokenizer and chat template: the tokens they gave when they entered the store, held to ever after.

A changed newline in a template shifts every token of every chat, and no weight or shape shows it: the model only answers
worse. So the tokens of fixed conversations, and which of them the assistant said, are taken once, where a tokenizer enters
the store; they lie in the manifest's facts, each later stage checks that it still gets the very same ones and hands them
on, and the server checks them before it is ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineshaft.base import manifest
from lineshaft.base.config import Config, load
from lineshaft.base.errors import BrokenContract, RequestError
from lineshaft.base.store import Artifact
from lineshaft.base.terminal import say
from lineshaft.text.chat import Span, render_marked, spoken_tokens
from lineshaft.text.golden import CONVERSATIONS, NOW, SET, TEXTS, Conversation
from lineshaft.text.tokenizer import Tokenizer

FACT = "contract"
"""Name of the contract among a manifest's facts."""

_REMEDY = "put its tokenizer.json, tokenizer_config.json and chat_template.jinja back as they were, or make it again from another tokenizer"


class Golden(Config):
    """What one conversation or text became. Numbers are written as text, which keeps a manifest readable."""

    ids: str = ""
    """Token ids, separated by spaces."""
    spoken: str | None = None
    """Tokens that the assistant said, as `first:behind_last` separated by spaces; null where the template can't tell."""
    refused: bool = False
    """The template, or the tokenizer, does not take it."""


class Contract(Config):
    """What the facts hold."""

    set: int
    """Number of the set of conversations and texts."""
    vocabulary: str
    """SHA-256 of which token has which id."""
    texts: dict[str, Golden]
    chats: dict[str, Golden]
    """Empty when there is no chat template."""


def golden(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contract of a tokenizer as it is now, as JSON."""
    return _made(tokenizer).model_dump(exclude_defaults=True)


def facts_of(folder: Path, source: Path | None = None) -> dict[str, Any]:
    """The fact to keep of a tokenizer that enters the store with the files in `folder`. Raises BadCheckpoint.

    `source`: the folder they were copied from. Where that is an artifact itself, its contract must be kept first (BrokenContract).
    """
    if source is not None and (source / manifest.FILE_NAME).exists():
        check_folder(source)
    return {FACT: golden(Tokenizer.load(folder))}


def carried(parent: Artifact, folder: Path) -> dict[str, Any]:
    """The parent's contract as a fact of the artifact in `folder` that was made from it; {} when the parent has none.

    Raises BrokenContract when the files in `folder` do not keep it.
    """
    if FACT not in parent.manifest.facts:
        return {}
    check(parent.manifest.facts[FACT], Tokenizer.load(folder), parent.id)
    return {FACT: parent.manifest.facts[FACT]}


def check_folder(folder: Path) -> None:
    """Hold the tokenizer in an artifact's folder to the contract in its manifest. Raises BrokenContract.

    Where there is no contract (a folder from elsewhere, an artifact of an older version) one line says so.
    """
    if not (folder / manifest.FILE_NAME).exists():
        say(f"{folder}: no artifact, so there is no chat contract to check its tokenizer against; `lineshaft adopt` makes one")
        return
    found = manifest.read(folder)
    if FACT not in found.facts:
        say(f"{found.id}: made before there were chat contracts, its tokenizer is not checked; make it again to have one")
        return
    check(found.facts[FACT], Tokenizer.load(folder), found.id)


def check(contract: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> None:
    """Raises BrokenContract, showing the first token that differs, unless the tokenizer gives what `contract` holds."""
    wanted = load(Contract, contract, f"{where}: {FACT}")
    if wanted.set != SET:
        told = "make the artifact again" if wanted.set < SET else "use the newer lineshaft that made it"
        raise BrokenContract(f"{where}: its contract is of golden set {wanted.set}, this lineshaft has set {SET}: {told}")
    found = _made(tokenizer)
    if found == wanted:
        return
    broken = _differences(wanted, found, _Reader(tokenizer, wanted.vocabulary == found.vocabulary))
    raise BrokenContract(f"{where}: the tokenizer or chat template is not the one it was made with: {broken}; {_REMEDY}")


def described(contract: Mapping[str, Any]) -> str:
    """A contract in one line."""
    known = load(Contract, contract, FACT)
    if not known.chats:
        return f"{len(known.texts)} texts, no chat template; set {known.set}"
    refused = sum(item.refused for item in known.chats.values())
    spans = "the assistant's tokens marked" if any(item.spoken for item in known.chats.values()) else "the assistant's tokens not marked"
    return f"{len(known.chats)} conversations ({refused} refused by the template), {spans}, {len(known.texts)} texts; set {known.set}"


# -- making it ----------------------------------------------------------------------------------------------------------


def _made(tokenizer: Tokenizer) -> Contract:
    chats = {} if tokenizer.chat_template is None else CONVERSATIONS
    return Contract(
        set=SET,
        vocabulary=tokenizer.vocabulary_sha256(),
        texts={name: _of_text(tokenizer, text) for name, text in TEXTS.items()},
        chats={name: _of_chat(tokenizer, chat) for name, chat in chats.items()},
    )


def _of_text(tokenizer: Tokenizer, text: str) -> Golden:
    try:
        return Golden(ids=_joined(tokenizer.encode(text)))
    except RequestError:
        return Golden(refused=True)


def _of_chat(tokenizer: Tokenizer, chat: Conversation) -> Golden:
    assert tokenizer.chat_template is not None
    names = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    try:
        rendered = render_marked(
            tokenizer.chat_template, chat.messages, **names, add_generation_prompt=chat.prompt, tools=chat.tools, now=NOW
        )
        ids, offsets = tokenizer.encode_placed(rendered.text)
    except RequestError:  # its words are not kept: some are those of a library, and change with it
        return Golden(refused=True)
    spoken = None if rendered.spoken is None else spoken_tokens(rendered.spoken, offsets)
    return Golden(ids=_joined(ids), spoken=None if spoken is None else " ".join(f"{first}:{stop}" for first, stop in spoken))


def _joined(ids: list[int]) -> str:
    return " ".join(map(str, ids))


# -- telling what differs -----------------------------------------------------------------------------------------------


class _Reader:
    """Reads tokens aloud."""

    def __init__(self, tokenizer: Tokenizer, same_vocabulary: bool) -> None:
        self._tokenizer, self._same = tokenizer, same_vocabulary

    def found(self, number: int) -> str:
        """An id that the tokenizer at hand gave."""
        text = self._tokenizer.token_text(number)
        return f"{number} {'(no token)' if text is None else quoted(text)}"

    def wanted(self, number: int) -> str:
        """An id from the contract, whose text is only known while the vocabulary is the same."""
        return self.found(number) if self._same else f"{number} (of another vocabulary)"


def quoted(text: str) -> str:
    """Text with its newlines and invisible characters spelled out."""
    return '"' + "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text) + '"'


def _differences(wanted: Contract, found: Contract, reader: _Reader) -> str:
    """The first difference in words, and how many there are. Texts come first: where they differ the template is not to blame."""
    if bool(wanted.chats) != bool(found.chats):
        return f"there {'is a' if found.chats else 'is no'} chat template now, there was {'one' if wanted.chats else 'none'}"
    pairs = [(f'text "{name}"', item, found.texts[name]) for name, item in wanted.texts.items()]
    pairs += [(f'conversation "{name}"', item, found.chats[name]) for name, item in wanted.chats.items()]
    broken = [(name, old, new) for name, old, new in pairs if old != new]
    if not broken:
        return "all texts and conversations give the same ids, yet other tokens of the vocabulary have changed"
    name, old, new = broken[0]
    return f"{name}, {_difference(old, new, reader)} ({len(broken)} of {len(pairs)} texts and conversations differ)"


def _difference(old: Golden, new: Golden, reader: _Reader) -> str:
    if old.refused or new.refused:
        return "which is refused now" if new.refused else "which was refused, is taken now"
    if old.ids != new.ids:
        return _first_token(_ids(old), _ids(new), reader)
    if old.spoken is None or new.spoken is None:
        return f"the tokens that the assistant said are {'no longer' if new.spoken is None else 'newly'} known"
    return _first_mark(old, new, reader)


def _first_token(old: list[int], new: list[int], reader: _Reader) -> str:
    place = next((i for i, (want, have) in enumerate(zip(old, new, strict=False)) if want != have), min(len(old), len(new)))
    want = reader.wanted(old[place]) if place < len(old) else "the end"
    have = reader.found(new[place]) if place < len(new) else "the end"
    return f"token {place}: expected {want}, got {have}"


def _first_mark(old: Golden, new: Golden, reader: _Reader) -> str:
    place = min(_inside(_spans(old)) ^ _inside(_spans(new)))
    was, now = ("in", "outside") if place in _inside(_spans(old)) else ("outside", "in")
    return f"token {place}, {reader.found(_ids(new)[place])}: expected {was} the loss mask (what the assistant said), got {now} it"


def _ids(item: Golden) -> list[int]:
    return [int(number) for number in item.ids.split()]


def _spans(item: Golden) -> list[Span]:
    pairs = (span.split(":") for span in (item.spoken or "").split())
    return [(int(first), int(stop)) for first, stop in pairs]


def _inside(spans: list[Span]) -> set[int]:
    return {place for first, stop in spans for place in range(first, stop)}
