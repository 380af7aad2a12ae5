"""The pages of the repository: links lead somewhere, README stays short and plain, its example runs.
Knows: markdown files. Must not know: what the code behind them does.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icefall_fusion.data import espeak

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("egs/**/*.md"), *ROOT.glob("icefall_fusion/**/*.md")])
MOST_LINES, MOST_WORDS = 160, 35


def prose(text: str) -> str:
    """Return a page without code blocks, tables and headings."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    return "\n".join("" if line.startswith(("|", "#", "![")) else line for line in text.splitlines())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_readme_is_short_and_plain() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for paragraph in re.split(r"\n\s*\n|\n(?=\d+\. |- )", prose(text)):
        for sentence in re.split(r"(?<=[.?!:])\s+", " ".join(paragraph.split())):
            words = re.sub(r"\]\([^)]*\)", "]", sentence).split()
            assert len(words) <= MOST_WORDS, f"{len(words)} words: {sentence}"


@pytest.mark.skipif(not espeak.available(), reason="needs espeakng-loader")
def test_the_first_example_runs(tmp_path) -> None:
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    example = example.replace('"egs/', f'"{ROOT}/egs/')
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"```python\n.*?```\s*```\n(.*?)```", text, re.DOTALL).group(1).splitlines()
    printed = done.stdout.strip().splitlines()
    assert len(printed) == len(shown) == 2
    for ours, page in zip(printed, shown):
        assert ours.split(" {")[0] == page.split(" {")[0]
