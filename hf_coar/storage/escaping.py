"""What comes from elsewhere, made harmless where it is shown: on a terminal, in Markdown, in Python that people copy.

Names of models, data, classes and components, settings and messages may hold anything: sequences that drive a terminal,
HTML, headings, code. HTML pages use `html.escape`, JSON and Python strings `json.dumps`.
"""

import keyword
import re
from collections.abc import Mapping
from typing import Any

# Controls but tab and line feed, lone surrogates, and what turns the direction of writing or hides.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_PAINT = re.compile("\033\\[(?:0|1|2|31)m")
_MARKUP = re.compile(r"[\\`*<>#|~&]|\](?=\s*[(\[:])")  # brackets only where they could be of a link
_BEGINS_BLOCK = re.compile(r"^(?:(?=[-+=])|(\d+)(?=[.)](?:\s|$)))")


def for_terminal(text: str, paint: bool = False) -> str:
    """A text for a terminal: characters that would drive it are spelled out, such as `\\x1b`.

    Args:
        text: of any origin; line breaks and tabs stay.
        paint: let the colours through that this package uses, and no other sequence.
    """
    if not paint:
        return _UNSEEN.sub(_spelled, text)
    pieces, position = [], 0
    for match in _PAINT.finditer(text):
        pieces += [for_terminal(text[position : match.start()]), match[0]]
        position = match.end()
    return "".join([*pieces, for_terminal(text[position:])])


def for_markdown(text: Any) -> str:
    """A text as plain words of one line of Markdown: in a paragraph, a heading or a cell of a table."""
    line = for_terminal(" ".join(str(text).split()))
    return _BEGINS_BLOCK.sub(lambda match: match[0] + "\\", _MARKUP.sub(_marked, line))


def code_span(text: Any) -> str:
    """A text as code in a line of Markdown."""
    line = for_terminal(" ".join(str(text).split())).replace("|", "\u2502")
    return f"`{line.replace('`', chr(39)) or ' '}`"


def all_for_markdown(value: Any) -> Any:
    """Every text in nested JSON values, keys too, by `for_markdown`."""
    if isinstance(value, Mapping):
        return {for_markdown(key): all_for_markdown(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [all_for_markdown(entry) for entry in value]
    return for_markdown(value) if isinstance(value, str) else value


def python_name(name: Any, otherwise: str) -> str:
    """A name that may stand in Python code; `otherwise` in the place of anything that is more than a name."""
    known = isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
    return name if known else otherwise


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _marked(match: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(match[0], "\\" + match[0])
