"""reStructuredText as a list of plain blocks.

The rules cover what the Python manual uses, not all of reStructuredText: roles become the words
a reader would see, paragraphs are unwrapped, tables and markup for indexes are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DROPPED = re.compile(
    "index|module|sectionauthor|moduleauthor|toctree|contents|highlight|currentmodule|image|figure"
    "|only|raw|include|literalinclude|tabularcolumns|csv-table|list-table|audit-event|testsetup"
    "|testcleanup|py:currentmodule|impl-detail-marker|table|rubric|audit-event-table"
)
LITERAL = re.compile(
    "code-block|code|sourcecode|doctest|testcode|testoutput|parsed-literal|productionlist"
)
OBJECTS = {
    "function": "function",
    "method": "method",
    "class": "class",
    "classmethod": "class method",
    "staticmethod": "static method",
    "coroutinefunction": "coroutine",
    "decorator": "decorator",
    "exception": "exception",
    "data": "constant",
    "attribute": "attribute",
    "coroutinemethod": "coroutine method",
    "abstractmethod": "abstract method",
    "c:function": "C function",
    "c:macro": "C macro",
    "c:type": "C type",
    "c:var": "C variable",
    "opcode": "opcode",
    "option": "option",
    "envvar": "environment variable",
    "pdbcommand": "debugger command",
    "describe": "expression",
}
LABELS = {
    "note": "Note:",
    "warning": "Warning:",
    "caution": "Caution:",
    "tip": "Tip:",
    "seealso": "See also:",
    "impl-detail": "CPython implementation detail:",
    "versionadded": "New in version {}:",
    "versionchanged": "Changed in version {}:",
    "deprecated": "Deprecated since version {}:",
    "availability": "Availability:",
}
PLAIN_ROLES = re.compile("ref|term|doc|dfn|abbr|source|manpage|guilabel|menuselection|mimetype")

_DIRECTIVE = re.compile(r"\.\.\s+([\w:-]+)::\s*(.*)$")
_UNDERLINE = re.compile(r"([=\-~^*#+`:.\"'<>])\1{2,}\s*$")
_TABLE_EDGE = re.compile(r"={2,}( +={2,})+\s*$")
_LIST_ITEM = re.compile(r"(?:[*+-]|#\.|\(?\w{1,2}[.)])\s+\S")
_FIELD = re.compile(r":[\w -]+:(\s.*)?$")
_ROLE = re.compile(r":([\w:+-]+):`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]+>`__?")
_SIGNATURE = re.compile(r"[\w.]+")
_C_NAME = re.compile(r"(\w+)(\(.*)?$")


@dataclass
class Block:
    """One piece of a document: heading, prose, code or object (a described name)."""

    kind: str
    text: str
    subject: str = ""  # of an object: what kind of thing it is, and its name
    indent: int = 0


def inline(text: str) -> str:
    """Replace inline markup by what a reader sees."""
    text = _ROLE.sub(lambda m: _role(m.group(1), m.group(2)), text)
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"(?<!`)`([^`]+)`__?(?![`\w])", r"\1", text)
    text = re.sub(r" ?\[[#\w]*\]_", "", text)
    text = re.sub(r"``+", "`", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text)
    text = re.sub(r"\\ ", "", text)
    text = re.sub(r"\\([*_`|\\])", r"\1", text)
    text = re.sub(r" ---? ", " - ", text)
    return re.sub(r"  +", " ", text)


def _role(role: str, content: str) -> str:
    titled = re.match(r"(.+?)\s*<[^>]+>$", content, re.DOTALL)
    shown = titled.group(1) if titled else content.lstrip("!")
    if shown.startswith("~"):
        shown = shown.rpartition(".")[2]
    role = role.rpartition(":")[2]
    if PLAIN_ROLES.fullmatch(role):
        return shown
    if role in ("pep", "rfc", "issue", "bpo"):
        return shown if titled else f"{role.upper().replace('ISSUE', 'issue')} {shown}"
    if role in ("func", "meth") and not shown.endswith(")"):
        shown += "()"
    return f"`{shown}`"


class Reader:
    """One pass over the lines of a page; ``blocks`` is the result."""

    def __init__(self, source: str):
        self.blocks: list[Block] = []
        self._paragraph: list[str] = []
        self._indent = 0
        self._label = ""
        self._module = ""
        self._skip: int | None = None  # drop lines indented deeper than this
        self._literal: int | None = None  # keep lines indented deeper than this as code
        self._in_table = False
        self._object_continues = False
        self._signature_open = False
        for line in source.expandtabs().splitlines():
            self._line(line.rstrip())
        self._flush()

    def _line(self, line: str) -> None:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if self._inside(line, text, indent):
            return
        if not text:
            self._object_continues = False
            self._flush()
        elif text.startswith(".."):
            self._markup(text, indent)
        elif self._object_continues and not _FIELD.match(text):
            self._continue_object(text, indent)
        elif _TABLE_EDGE.match(text):
            self._flush()
            self._in_table = True
        elif _UNDERLINE.match(text):
            self._heading()
        elif text[0] in "|+" and text[-1] in "|+":
            self._flush()
        elif not _FIELD.match(text):
            self._prose(text, indent)

    def _inside(self, line: str, text: str, indent: int) -> bool:
        """Whether an enclosing dropped, literal or table block takes the line."""
        if self._skip is not None:
            if not text or indent > self._skip:
                return True
            self._skip = None
        if self._literal is not None:
            if not text or indent > self._literal:
                self._code(line)
                return True
            self._literal = None
        if self._in_table:
            self._in_table = bool(text)
            return True
        return False

    def _markup(self, text: str, indent: int) -> None:
        self._flush()
        directive = _DIRECTIVE.match(text)
        name, argument = directive.groups() if directive else ("", "")
        if name in ("module", "currentmodule", "py:currentmodule"):
            self._module = argument
        if name in OBJECTS:
            self._object(name, argument, indent)
        elif LITERAL.fullmatch(name):
            self._literal = indent
        elif name in LABELS:
            self._admonition(LABELS[name], argument, indent)
        elif not directive or DROPPED.fullmatch(name):
            self._skip = indent

    def _admonition(self, label: str, argument: str, indent: int) -> None:
        """A label for the paragraph that follows, or a line of its own where none follows."""
        rest = argument
        if "{}" in label:
            version, _, rest = argument.partition(" ")
            label = label.format(version)
            if not rest and label.startswith("New"):
                self._add("prose", label.rstrip(":") + ".", indent=indent)
                return
        self._label = label
        if rest:
            self._prose(rest, indent)

    def _object(self, name: str, signature: str, indent: int) -> None:
        is_open = signature.endswith("\\")
        signature = signature.rstrip("\\").strip()
        found = (_C_NAME.search if name.startswith("c:") else _SIGNATURE.match)(signature)
        called = found.group(found.re.groups and 1) if found else signature
        if found and self._module and name in ("function", "class", "data", "exception"):
            called = called if called.startswith(self._module) else f"{self._module}.{called}"
        if name.endswith(("function", "method")):
            called += "()"
        self._add("object", f"`{signature}`", subject=f"{OBJECTS[name]} `{called}`", indent=indent)
        self._object_continues = True
        self._signature_open = is_open

    def _continue_object(self, text: str, indent: int) -> None:
        """A further signature of the same object, or the rest of one broken by a backslash."""
        signature = text.rstrip("\\").strip()
        if self._signature_open:
            last = self.blocks[-1]
            last.text = f"{last.text[:-1]} {signature}`"
        else:
            self._add("object", f"`{signature}`", indent=indent)
        self._signature_open = text.endswith("\\")

    def _heading(self) -> None:
        if len(self._paragraph) == 1:
            title = self._paragraph.pop()
            self._add("heading", inline(title))

    def _code(self, line: str) -> None:
        last = self.blocks[-1] if self.blocks else None
        if last is not None and last.kind == "code":
            last.text += "\n" + line
        elif line:
            self._add("code", line)

    def _prose(self, text: str, indent: int) -> None:
        if text.startswith(">>>"):
            self._flush()
            self._literal = indent - 1
            self._code(" " * indent + text)
            return
        if self._paragraph and (indent > self._indent + 3 or _LIST_ITEM.match(text)):
            self._flush()
        if not self._paragraph:
            self._indent = indent
        elif indent > self._indent and self._starts_definition():
            self._flush()
            self._indent = indent
        self._paragraph.append(text)

    def _starts_definition(self) -> bool:
        """Whether the paragraph so far is one line that a deeper line would define."""
        return len(self._paragraph) == 1 and not _LIST_ITEM.match(self._paragraph[0])

    def _flush(self) -> None:
        if not self._paragraph:
            return
        text = " ".join(self._paragraph)
        self._paragraph = []
        if text.endswith("::"):
            text = text[:-2].rstrip() + ":" if text != "::" else ""
            self._literal = self._indent
        if text:
            self._add("prose", inline(f"{self._label} {text}".strip()), indent=self._indent)
        self._label = ""

    def _add(self, kind: str, text: str, *, subject: str = "", indent: int = 0) -> None:
        self.blocks.append(Block(kind, text, subject, indent))
