"""Job ``export-transcripts``: texts of manifests as JSON lines, without the books of held-out sets.
Knows: manifests of cuts, their supervisions' texts. Must not know: audio, vocabularies, models.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from tqdm import tqdm

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import atomic_path
from icefall_fusion.data.cut_lines import read_lines
from icefall_fusion.data.manifests import check_corpus, cuts_path


@dataclass(frozen=True)
class TranscriptsOptions:
    """Write a corpus' ``text/train.jsonl`` and ``text/dev.jsonl``, for train-tokenizers and prepare-lm-text.

    A line is ``{"id", "text", "cased"}``, and ``"book"`` where cuts have it: other readers may have read a
    book of the test sets, and a language model must not have seen their words.

    Args:
        data_dir: has ``manifests/CORPUS_cuts_SPLIT.jsonl.gz``; ``text/`` is written there.
        corpus: name that the manifests begin with.
        train: the split that becomes train.jsonl.
        dev: the split that becomes dev.jsonl.
        held_out: splits whose books are left out of train; dev's always are.
    """

    data_dir: str = "data"
    corpus: str = ""
    train: str = "train"
    dev: str = "dev"
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_corpus(self.corpus, "TranscriptsOptions.corpus")


def run(options: TranscriptsOptions) -> int:
    """Write both files and print which books were left out; return 0.

    Raises:
        FileNotFoundError: a manifest is missing.
        ValueError: a cut has no text, or one of train is in a held-out set too.
    """
    tests = {row["id"]: row for split in (options.dev, *options.held_out) for row in _texts(options, split)}
    held_out = {row["book"] for row in tests.values() if "book" in row}
    for name, split in (("dev", options.dev), ("train", options.train)):
        kept = left_out = 0
        target = Path(options.data_dir) / "text" / f"{name}.jsonl"
        with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as lines:
            for row in _texts(options, split):
                where, rule = f"cut {row['id']!r} of {split}", "not be in dev or a held-out set too"
                check(name == "dev" or row["id"] not in tests, where, rule, row["text"])
                if name == "train" and row.get("book") in held_out:
                    left_out += 1
                    continue
                kept += 1
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            check(kept > 0, f"{target}", "get a text at least", kept)
        print(f"{split}: {kept} texts, {left_out} of books of held-out sets left out -> {target}")
    return 0


def _texts(options: TranscriptsOptions, split: str) -> Iterator[dict[str, Any]]:
    """Yield id, text, cased and book of every cut of a split."""
    path = cuts_path(Path(options.data_dir) / "manifests", split, options.corpus)
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}: make it first (the recipe's local script)")
    for number, line in tqdm(read_lines(path), desc=split, unit="cut"):
        cut = json.loads(line)
        supervision = (cut.get("supervisions") or [{}])[0]
        check(isinstance(supervision.get("text"), str), f"{path}, line {number}, cut {cut.get('id')!r}",
              "have a supervision with a text", supervision.get("text"))
        custom = supervision.get("custom") or {}
        text = supervision["text"]
        row = {"id": cut["id"], "text": text, "cased": custom.get("cased", text)}
        yield {**row, "book": custom["book"]} if "book" in custom else row
