"""Job ``report``: the table of decode runs, or two methods compared word by word.
Knows: files of runs, references, a language model to ask. Must not know: searches, how words were recognized.
"""
from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Union

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import opener, write_json, write_text
from icefall_fusion.data import espeak
from icefall_fusion.data.reading import reading_of
from icefall_fusion.decode.comparison import compare
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.scoring import table
from icefall_fusion.scoring.compare import Comparison
from icefall_fusion.scoring.score import kept_language, read_texts
from icefall_fusion.scoring.wer import EPS, MEASURES
from icefall_fusion.scoring.word_kinds import WordKinds
from icefall_fusion.text.language import ENGLISH, Language, language_of


@dataclass(frozen=True)
class ReportOptions(table.ReportOptions):
    """Collect decode runs into one table and one plot, or compare two methods word by word.

    Args:
        runs: folders of decode runs (searched at any depth) or ``results.json`` files.
        out: folder for results.json, table.md and wer-vs-speed.png, or for compare.md, compare.html and
            compare.json; empty: nothing is written.
        markdown: print the table as markdown.
        compare: two files of N-best lists of one test set, ``nbest-SET-METHOD.jsonl``; the second is the
            method of which the words won and lost are told. Files of texts serve too, see the job score.
        ref: the references: a manifest of cuts, JSON lines or lines of ``id text``.
        text: a text file in which words are counted, to tell rare ones; empty: the references.
        llm: a language model that is asked for the scores of both readings; empty path: none.
        examples: of each kind and outcome.
        samples: of the paired bootstrap.
        measure: which words count, see the job score.
        language: ISO 639 code of the texts, see the job score; empty: as the compared files say.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    compare: list[str] = field(default_factory=list)
    ref: str = ""
    text: str = ""
    llm: LmOptions = field(default_factory=LmOptions)
    examples: int = 5
    samples: int = 10_000
    measure: str = "normalized"
    language: str = ""
    normalizer: str = ""

    def __post_init__(self) -> None:
        if not self.compare:
            super().__post_init__()
            for name in ("language", "normalizer"):  # runs were scored when they were decoded
                value = getattr(self, name)
                check(not value, f"ReportOptions.{name}", "be left out without ReportOptions.compare", value)
            return
        language_of(self.language, self.normalizer)
        check(not self.runs, "ReportOptions.runs", "be left out with ReportOptions.compare", self.runs)
        check(len(self.compare) == 2, "ReportOptions.compare", "name two files", self.compare)
        check(bool(self.ref), "ReportOptions.ref", "name the references", self.ref)
        check_at_least(0, self, "examples")
        check_at_least(1, self, "samples")
        check_choice(self.measure, MEASURES, "ReportOptions.measure")


def run(options: ReportOptions) -> int:
    """Run the job ``report``."""
    if not options.compare:
        return table.run(options)
    references = read_texts(options.ref)
    lists = [_lists(read_texts(path, nbests=True)) for path in options.compare]
    names = tuple(_method_of(path, [Path(p).stem for p in options.compare]) for path in options.compare)
    texts = [{name: nbest[0].text for name, nbest in found.items()} for found in lists]
    language = language_of(options.language, options.normalizer, kept_language(*options.compare))
    counts = _counts(options.text, references.values(), language)
    kinds = WordKinds(counts, names_in(options.ref), language=language)
    made = Comparison(references, *texts, kinds, options.measure, options.samples, language)
    kinds.sounds = _sounds(made)
    page, content = compare(made, names, lists, options.llm, options.examples)
    print(page.markdown(), end="")
    if options.out:
        folder = Path(options.out)
        write_text(folder / "compare.md", page.markdown())
        write_text(folder / "compare.html", page.html())
        write_json(folder / "compare.json", content)
        logging.info("wrote compare.md, compare.html and compare.json to %s", folder)
    return 0


def _lists(found: Mapping[str, Union[str, NBest]]) -> dict[str, NBest]:
    """Return N-best lists; a text alone is a list of one hypothesis."""
    return {
        name: value if isinstance(value, NBest) else NBest(name, [Hypothesis([], value, {"total": 0.0})])
        for name, value in found.items()
    }


def _method_of(path: str, stems: list[str]) -> str:
    """Return the method of a run file, or what tells two files apart."""
    stem = Path(path).stem
    found = re.fullmatch(r"nbest-[^-]+(?:-(?:clean|other))?-(.+)", stem)
    if stems.count(stem) > 1:
        return str(Path(path).with_suffix(""))
    return found.group(1) if found else stem


def _counts(path: str, references: Iterable[str], language: Language) -> Counter[str]:
    """Count the words of a text file (or of the references), of English in lower case, else normalized."""
    counts: Counter[str] = Counter()
    if not path:
        for line in references:
            counts.update(line.lower().split() if language == ENGLISH else language.units(line))
        return counts
    if not Path(path).is_file():
        raise FileNotFoundError(f"ReportOptions.text must name a file, but there is none at {path}")
    split = language.units if language != ENGLISH else lambda line: re.findall(r"[\w']+", line.lower())
    with opener(path)(path, "rt", encoding="utf-8") as file:
        for line in file:
            counts.update(split(line))
    return counts


def names_in(path: str) -> set[str]:
    """Return the names in references with the custom field ``cased``: capitals inside of sentences.

    Args:
        path: of a manifest of cuts; other files have no names.
    """
    names: set[str] = set()
    small: set[str] = set()
    if ".jsonl" not in Path(path).name:
        return set()
    with opener(path)(path, "rt", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                continue
            for supervision in json.loads(line).get("supervisions", []):
                cased = (supervision.get("custom") or {}).get("cased") or ""
                for match in re.finditer(r"([.!?:\"“”‘(—¿¡«]\W*)?\b([^\W\d_][\w'’]*)", cased):
                    word = match.group(2).replace("’", "'")
                    if word[0].islower():
                        small.add(word)
                    elif match.start() > 0 and not match.group(1) and word[1:2].isalpha():
                        names.add(word.lower())
    return names - small


def _sounds(made: Comparison) -> Any:
    """Return a function that tells how a word sounds, by eSpeak NG; None, with a warning, where it lacks.

    For a language without a voice in `data.reading` it lacks too.
    """
    accents = reading_of(made.language).accents or ("en-us",) * (made.language.base == "en")
    if not accents:
        logging.warning("homophones are not told apart: there is no voice of %s", made.language.name)
        return None
    words = {
        word for slots in made.slots.values() for slot in slots if slot.outcome != "right"
        for word in slot if word != EPS
    }
    if not espeak.available():
        logging.warning("homophones are not told apart: espeakng-loader is not installed")
        return None
    return espeak.engine().phonemes(sorted(words), espeak.Voice(accents[0])).get
