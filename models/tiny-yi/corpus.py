"""The pages of the Python manual as plain English text, and questions with answers from them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rst import Block, Reader

PACKAGE = "python3.11-doc"
HELD_OUT_EVERY = 40
# The changelog is 1.6 MB of one-line entries: a fifth of the text and none of the prose.
LEFT_OUT = ("whatsnew/changelog.rst.txt", "contents.rst.txt", "library/index.rst.txt")

_ASIDE = re.compile(
    r"(New|Changed|Deprecated|Note|Warning|Availability|See also|\*\*Source)\b.*[.:]"
)


def download_corpus() -> Path:
    """Fetch and unpack the Debian package into a fresh temporary folder; needs apt and dpkg."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-yi-corpus-"))
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return folder


def read_documents(folder: Path) -> Iterator[tuple[str, list[Block]]]:
    """Yield (path below the sources folder, blocks) for every page, in a fixed order."""
    pages = {}
    for path in folder.rglob("*.rst.txt"):
        name = path.as_posix().rpartition("_sources/")[2]
        if name not in LEFT_OUT:
            pages[name] = path
    for name in sorted(pages):
        blocks = Reader(pages[name].read_text(encoding="utf-8")).blocks
        if sum(len(block.text) for block in blocks) > 400:
            yield name, blocks


def _code_text(text: str) -> str:
    lines = text.rstrip().splitlines()
    margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    return "\n".join(("    " + x[margin:]).rstrip() for x in lines)


def plain_text(blocks: list[Block]) -> str:
    """Join the blocks of a page; headings get a leading '# '."""
    forms = {"heading": "# {}".format, "code": _code_text}
    return "\n\n".join(forms.get(b.kind, str)(b.text) for b in blocks) + "\n"


def questions(name: str, blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) where the page describes a name, a term or asks by itself."""
    is_glossary = name.startswith("glossary")
    blocks = [b for b in blocks if not (b.kind == "prose" and _ASIDE.match(b.text))]
    for block, after in zip(blocks, blocks[1:], strict=False):
        answer = after.text
        if after.kind != "prose" or not 40 <= len(answer) <= 600 or answer[-1] != ".":
            continue
        if block.kind == "object" and block.subject:
            yield f"What does the {block.subject} do?", answer
        elif block.kind == "heading" and block.text.endswith("?"):
            yield block.text, answer
        elif block.kind == "heading" and (m := re.match(r"(`[\w.]+`) - ", block.text)):
            yield f"What is the module {m.group(1)} for?", answer
        elif is_glossary and block.kind == "prose" and after.indent == block.indent + 3:
            yield f"What is meant by {block.text}?", answer
