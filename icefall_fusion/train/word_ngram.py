"""Job ``train-word-ngram``: an n-gram over words by KenLM's lmplz, for decoding graphs and lattices.
Knows: JSON lines with texts, the program lmplz. Must not know: pieces, graphs, models.
"""
from __future__ import annotations

import collections
import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import atomic_path, opener
from icefall_fusion.text.scripts import split_units


@dataclass(frozen=True)
class TrainWordNgramOptions:
    """Train an n-gram over words (modified Kneser-Ney, by KenLM's lmplz).

    Args:
        text: JSON lines with a field "text" (text/train.jsonl of a recipe).
        out: the ARPA file to write; gzipped if it ends in .gz.
        lmplz: the program; tools/build_lmplz.sh builds it and prints its path.
        order: longest n-gram.
        prune: for n = 1, 2, ...: the largest count that is left out; the last holds for longer n-grams.
        min_count: smallest count of a word in the vocabulary.
        memory: limit for lmplz, e.g. 1G or 80%.
        discount_fallback: use fixed discounts where the text is too small to estimate them.
    """

    text: str
    out: str
    lmplz: str = "lmplz"
    order: int = 3
    prune: tuple[int, ...] = (0, 3, 6)
    min_count: int = 8
    memory: str = "1G"
    discount_fallback: bool = False

    def __post_init__(self) -> None:
        check(1 <= self.order <= 6, "TrainWordNgramOptions.order", "be in 1..6", self.order)
        check_at_least(1, self, "min_count")
        rising = list(self.prune) == sorted(self.prune) and len(self.prune) <= self.order
        rule = "be at most `order` rising numbers from 0"
        check(rising and all(n >= 0 for n in self.prune), "TrainWordNgramOptions.prune", rule, self.prune)


def run(options: TrainWordNgramOptions) -> int:
    """Run the job ``train-word-ngram``; print the sizes.

    Raises:
        FileNotFoundError: the text is missing.
        ModuleNotFoundError: lmplz is missing; with the remedy.
        ValueError: no word of the text is frequent enough, or lmplz refuses the text; with its message.
    """
    lmplz = shutil.which(options.lmplz)
    if lmplz is None:
        remedy = "bash tools/build_lmplz.sh builds it and prints its path"
        raise ModuleNotFoundError(f"there is no program {options.lmplz}: {remedy}")
    counts: collections.Counter[str] = collections.Counter()
    for line in _texts(options.text):
        counts.update(split_units(line))
    words = sorted(word for word, count in counts.items() if count >= options.min_count)
    rule = f"have a word with a count of at least {options.min_count} (min_count)"
    check(bool(words), f"the text {options.text}", rule, len(counts))
    with tempfile.TemporaryDirectory() as folder, atomic_path(options.out) as temporary:
        vocabulary, arpa = Path(folder) / "words.txt", Path(folder) / "ngram.arpa"
        vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
        command = [lmplz, "-o", str(options.order), "-S", options.memory, "-T", folder, "--arpa", str(arpa)]
        command += ["--limit_vocab_file", str(vocabulary)]
        command += ["--prune", *map(str, options.prune)] if options.prune else []
        command += ["--discount_fallback"] if options.discount_fallback else []
        _feed(command, options.text)
        with open(arpa, "rb") as source:
            sizes = [source.readline().decode().strip() for _ in range(options.order + 1)][1:]
            source.seek(0)
            with opener(options.out)(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
    print(f"{options.out}: {len(words)} words, {', '.join(sizes)}")
    return 0


def _feed(command: list[str], text: str) -> None:
    """Run lmplz on the lines of a text; its output is shown only if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as report:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=report, encoding="utf-8"
        )
        assert process.stdin is not None
        try:
            for line in _texts(text):
                process.stdin.write(line + "\n")
            process.stdin.close()
        except BrokenPipeError:  # it has ended already: the report has the reason
            pass
        if process.wait() != 0:
            report.seek(0)
            reason = " ".join(report.read().split())[-600:]
            raise ValueError(f"lmplz must accept the text {text}, but refuses it: {reason}")


def _texts(path: str) -> Iterator[str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no text at {path}")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield " ".join(split_units(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                message = f"{path} line {number} must be JSON with a text, but is {line[:80]!r}"
                raise ValueError(message) from None
