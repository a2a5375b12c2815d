"""Cleaning steps: each takes a text and gives the repaired one, unchanged where nothing is wrong.

The order matters: garbled characters look like control characters, so they are repaired first; entities can hold both
line ends and decomposed letters, so markup goes before Unicode's normal form and white space.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping

import ftfy
from ftfy.badness import is_bad

# -- garbled characters ------------------------------------------------------------------------------------------


def mojibake(text: str) -> str:
    """UTF-8 that was once read as something else (`cafÃ©`), line by line, only where ftfy's badness measure says so.

    Nothing else of ftfy is used: full-width punctuation, curly quotes and ligatures are not defects.
    """
    if not is_bad(text):
        return text
    return "\n".join(ftfy.fix_encoding(line) for line in text.split("\n"))


# -- control characters ------------------------------------------------------------------------------------------

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles, links
    r"|\x1b[ -/]*[0-~]"
)
_OVERSTRUCK = re.compile(r"[^\n\b]\x08")
"""A printer's bold or underlined letter, as in old manual pages: letter, backspace, letter."""
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_JUNK = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all controls but tab and line feed
    "\u00ad\u200b\u2060-\u2064\ufeff"  # invisible: soft hyphen, zero-width space, joiners, byte-order mark
    "\u202a-\u202e\u2066-\u2069"  # overrides of the writing direction
    "\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"  # annotations, noncharacters, halves of surrogate pairs
)
_WRITES_WITHOUT_JOINERS = "\x00-\x7f\\s\u3000-\u30ff\u3400-\u9fff\uff00-\uffef"
_LOST_JOINERS = re.compile(f"(?<![^{_WRITES_WITHOUT_JOINERS}])[\u200c\u200d]+|[\u200c\u200d]+(?![^{_WRITES_WITHOUT_JOINERS}])")
"""Joiners are part of emoji, Persian and Indic words; beside ASCII and Chinese they are junk."""


def control(text: str) -> str:
    """Without terminal escapes, control characters (but tab and line feed), byte-order marks and invisible junk."""
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    if "\b" in text:
        text = _OVERSTRUCK.sub("", text)
    return _LOST_JOINERS.sub("", _JUNK.sub("", _LINE_ENDS.sub("\n", text)))


# -- markup ------------------------------------------------------------------------------------------------------

_BLOCK = (
    "address|article|aside|blockquote|body|br|center|dd|div|dl|dt|figure|footer|form|h[1-6]|head|header|hr|html|li|main|nav|ol|p|pre"
    "|section|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
_INLINE = (
    "a|abbr|acronym|b|big|cite|code|del|em|font|i|iframe|img|input|ins|kbd|label|link|mark|meta|noscript|q|s|samp|small|span|strike"
    "|strong|sub|sup|tt|u|var|video"
)
_ATTRIBUTES = r"""(?>\s+[A-Za-z_:][\w:.-]*(?>\s*=\s*(?>"[^"<]*"|'[^'<]*'|[^\s"'<>`]+))?){0,40}+\s*+"""
_TAG = re.compile(rf"<(?P<end>/)?(?P<name>{_BLOCK}|{_INLINE})(?=[\s/>])(?P<attributes>{_ATTRIBUTES})/?>", re.IGNORECASE)
_IS_BLOCK = re.compile(_BLOCK, re.IGNORECASE)
_HIDDEN = re.compile(
    r"<(script|style)\b[^<>]*>(?:(?!<\1\b).)*?</\1\s*>|<!--(?:(?!<!--).)*?-->|<!doctype\b[^<>]*>",
    re.IGNORECASE | re.DOTALL,
)
_TYPOGRAPHIC = re.compile(
    r"&(?:nbsp|hellip|middot|bull|mdash|ndash|[lr][sd]quo|copy|reg|trade|times|deg"
    r"|#(?:1[6-9]\d|[2-9]\d\d|[1-9]\d{3,5})|#x(?:a\d|[1-9a-f][0-9a-f]{2,4}));",
    re.IGNORECASE,
)
"""Character references that nobody writes in plain text, unlike `&lt;` or `&amp;` in a page about XML."""


def markup(text: str) -> str:
    """Without HTML tags, comments, scripts and styles, its character references resolved, if the text really is HTML.

    Elsewhere only typographic references such as `&hellip;` and `&#183;` are resolved.
    """
    if "<" in text and _is_html(text):
        text = _TAG.sub(lambda tag: "\n" if _IS_BLOCK.fullmatch(tag["name"]) else "", _HIDDEN.sub("", text))
        return html.unescape(text).replace("\xa0", " ")
    if "&" in text:
        return _TYPOGRAPHIC.sub(lambda reference: html.unescape(reference[0].lower()).replace("\xa0", " "), text)
    return text


def _is_html(text: str) -> bool:
    """Whether the text has what only markup has: a line break, an attribute in quotes, a tag that is closed again.

    A lone `<b>` or `<p>` may well be somebody's placeholder, and `<module 'x'>` is Python's.
    """
    opened: set[str] = set()
    for tag in _TAG.finditer(text):
        name = tag["name"].lower()
        if name == "br" or "=" in tag["attributes"] or (tag["end"] and name in opened):
            return True
        if not tag["end"]:
            opened.add(name)
    return False


# -- form --------------------------------------------------------------------------------------------------------


def unicode_form(text: str) -> str:
    """Unicode's composed form (NFC): one spelling for each accented letter."""
    return unicodedata.normalize("NFC", text)


_TRAILING = re.compile(r"[ \t\u00a0\u3000]+$", re.MULTILINE)
_GAPS = re.compile(r"\n{4,}")


def white_space(text: str) -> str:
    """No space at line ends, at most two blank lines in a row, one line end at the end; indentation stays."""
    tidy = _GAPS.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")
    return f"{tidy}\n" if "\n" in tidy else tidy


STEPS: Mapping[str, Callable[[str], str]] = {
    "mojibake": mojibake,
    "control": control,
    "markup": markup,
    "unicode_form": unicode_form,
    "white_space": white_space,
}
"""All steps in the order they are taken. Names stand in the facts of a corpus."""


def clean(text: str) -> tuple[str, list[str]]:
    """The cleaned text, and the names of the steps that changed it."""
    changed = []
    for name, step in STEPS.items():
        repaired = step(text)
        if repaired != text:
            changed.append(name)
            text = repaired
    return text, changed
