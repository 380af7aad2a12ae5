"""A page of headings, paragraphs and tables, as Markdown and as one HTML file that needs no other.
Knows: text. Must not know: what it tells.
"""
from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Sequence, Union

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24 }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem } th { background: #f3f4f6 }
td, th { border: 1px solid #d0d7de; padding: 0.2rem 0.6rem; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } mark { background: #fff3b0 }
@media (prefers-color-scheme: dark) { body { background: #15181c; color: #dfe3e8 } th { background: #22272e }
  td, th { border-color: #3a414a } mark { background: #6b5900; color: inherit } }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells; numbers stand to the right. In text, what is between two * is marked."""

    head: Sequence[str]
    rows: Sequence[Sequence[Union[str, int, float]]]


@dataclass
class Page:
    """A page, written from top to bottom."""

    title: str
    _blocks: list[tuple[str, Union[str, Table]]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._blocks.append(("heading", text))

    def paragraph(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._blocks.append(("paragraph", text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Union[str, int, float]]]) -> None:
        """Add a table, unless it has no rows."""
        if rows:
            self._blocks.append(("table", Table(head, rows)))

    def markdown(self) -> str:
        """Return the page as Markdown."""
        parts = [f"# {self.title}"]
        for kind, block in self._blocks:
            if isinstance(block, Table):
                lines = [block.head, ["---"] * len(block.head), *block.rows]
                parts.append("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
            else:
                parts.append(f"## {block}" if kind == "heading" else block)
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """Return the page as HTML without scripts, with its style inside."""
        title = html.escape(self.title)
        parts = [f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>"]
        parts += [f"<style>{_STYLE}</style>", f"<h1>{title}</h1>"]
        for kind, block in self._blocks:
            if isinstance(block, Table):
                head = "".join(f"<th>{html.escape(str(name))}" for name in block.head)
                rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) for row in block.rows)
                parts.append(f"<table><tr>{head}\n{rows}</table>")
            else:
                tag = "h2" if kind == "heading" else "p"
                parts.append(f"<{tag}>{html.escape(block)}</{tag}>")
        return "\n".join(parts) + "\n</html>\n"


def _shown(value: Union[str, int, float]) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def _cell(value: Union[str, int, float]) -> str:
    text = _shown(value).replace("|", "\\|")
    return text.replace("*", "**") if isinstance(value, str) and text.count("*") > 1 else text


def _html_cell(value: Union[str, int, float]) -> str:
    text = html.escape(_shown(value))
    if not isinstance(value, str):
        return f'<td class="number">{text}'
    parts = text.split("*")
    if len(parts) > 2 and len(parts) % 2:
        text = "".join(part if i % 2 == 0 else f"<mark>{part}</mark>" for i, part in enumerate(parts))
    return f"<td>{text}"
