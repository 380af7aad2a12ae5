"""Knows: the recipe's manifests; writes their texts as JSON lines, without the books of dev and test.
Must not know: audio, vocabularies, models.

    python local/text_lines.py --data_dir data --held_out dev test_clean test_other

Writes data/text/train.jsonl and data/text/dev.jsonl: {"id", "text", "cased", "book"} a line, for
train-tokenizers and prepare-lm-text. LibriHeavy's sets are of different speakers, but two readers may have
read the same book: a language model must not have seen the words of the test sets.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from tqdm import tqdm

from icefall_fusion.__main__ import parse_options
from icefall_fusion.checks import check
from icefall_fusion.data.cut_lines import read_lines
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.files import atomic_path

CORPUS, REFUSED = "libriheavy", 2


@dataclass(frozen=True)
class TextLinesOptions:
    """Write the texts of train and dev.

    Args:
        data_dir: has ``manifests/``; gets ``text/``.
        held_out: splits whose books are left out of train.
    """

    data_dir: Path = Path("data")
    held_out: tuple[str, ...] = ("dev", "test_clean", "test_other")

    def __post_init__(self) -> None:
        check(len(self.held_out) > 0, "TextLinesOptions.held_out", "name a split at least", self.held_out)


def texts(data_dir: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield id, text, cased and book of every cut of a split.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    path = cuts_path(data_dir / "manifests", split, CORPUS)
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}: make it first (local/libriheavy_cuts.py)")
    for _, line in tqdm(read_lines(path), desc=split, unit="cut"):
        cut = json.loads(line)
        said = cut["supervisions"][0]
        custom = said["custom"]
        yield {"id": cut["id"], "text": said["text"], "cased": custom["cased"], "book": custom["book"]}


def run(options: TextLinesOptions) -> int:
    """Write both files and say what was left out; return 0."""
    held_out = {row["book"] for split in options.held_out for row in texts(options.data_dir, split)}
    for split in ("dev", "train"):
        kept = left_out = 0
        target = options.data_dir / "text" / f"{split}.jsonl"
        with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as lines:
            for row in texts(options.data_dir, split):
                if split == "train" and row["book"] in held_out:
                    left_out += 1
                    continue
                kept += 1
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{split}: {kept} texts, {left_out} of books of {options.held_out} left out -> {target}")
    return 0


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        return run(parse_options(TextLinesOptions, sys.argv[1:], "python local/text_lines.py"))
    except (ValueError, TypeError, FileNotFoundError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
