"""The chat templates that come along, and the tokens each of them needs.

Their token and tag formats are those of the families they are named after; their wording is ours, so a model that was
trained elsewhere is served with the template in its own folder and never with one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TemplateName = Literal["plain", "chatml", "llama3", "mistral", "deepseek"]


@dataclass(frozen=True)
class Bundled:
    """Tokens of one template. None of them may ever be cut in two."""

    bos: str
    eos: str
    """Ends a document, and an answer: one token for both, so that whatever a model goes on with, this stops it."""
    pad: str
    special: tuple[str, ...] = ()
    """Built by the template alone; no reader of an answer sees them."""
    visible: tuple[str, ...] = ()
    """Written by the assistant, such as `<think>`; they stay in the answer's text."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All of them."""
        return (self.bos, self.eos, self.pad, *self.special, *self.visible)


BUNDLED: Mapping[TemplateName, Bundled] = {
    "plain": Bundled("<|bos|>", "<|eos|>", "<|pad|>"),
    "chatml": Bundled(
        "<|bos|>",
        "<|im_end|>",
        "<|pad|>",
        special=("<|im_start|>", "<tool_response>", "</tool_response>"),
        visible=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "llama3": Bundled(
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
        visible=("<think>", "</think>"),
    ),
    "mistral": Bundled(
        "<s>",
        "</s>",
        "<pad>",
        special=(
            *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        visible=("[THINK]", "[/THINK]", "[TOOL_CALLS]"),
    ),
    "deepseek": Bundled(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        special=("<｜User｜>", "<｜Assistant｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        visible=(
            *("<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
            *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
}


def source(name: TemplateName) -> str:
    """The Jinja source of a bundled template."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
