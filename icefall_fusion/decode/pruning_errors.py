"""Job ``pruning-errors``: what became of the words of the references that a method has wrong.
Knows: recognizers, methods, who watches a beam. Must not know: how a search prunes, which words are hard.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import write_json
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.decode.methods import Method
from icefall_fusion.decode.options import RecognizerOptions, check_nothing_is_normalized
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.report import names_in
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.fusion import DelayedFusion
from icefall_fusion.fusion.watch import FATES, BeamWatch
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.pages import Page
from icefall_fusion.scoring.wer import correct_words
from icefall_fusion.scoring.word_kinds import WordKinds
from icefall_fusion.search import Fusion


@dataclass(frozen=True, kw_only=True)
class PruningErrorsOptions(RecognizerOptions):
    """Count the words of references that a method with delayed fusion has wrong, by what became of them.

    Without ``emissions`` the models shipped with the repository are used.

    Args:
        cuts: a manifest with references, as the acoustic model spells words.
        method: its first pass must have a delayed fusion.
        limit: utterances, spread over the manifest; 0: all.
        out: file for the same as JSON; empty: none.
        language: ISO 639 code of the references: of which words or characters are counted, and their kinds.
    """

    cuts: str
    method: str = "llm-delayed-shortest"
    limit: int = 0
    out: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nothing_is_normalized(self)
        delayed = any(spec.trigger is not None for spec in parse_method(self.method).fusions)
        rule = "have a delayed fusion in a prefix search"
        good = delayed and not parse_method(self.method).of_lattices
        check(good, "PruningErrorsOptions.method", rule, self.method)
        check_at_least(0, self, "limit")


class WatchedMethod(Method):
    """A method whose beam is watched; the results are the same.

    Attributes:
        watches: one for each batch so far.
    """

    def __init__(self, *arguments: Any) -> None:
        self.watches: list[BeamWatch] = []
        super().__init__(*arguments)

    def _first_pass(
        self, emissions: Emissions, fusions: Sequence[Fusion],
        references: Optional[Mapping[str, Optional[str]]], counters: dict[str, float],
    ) -> list[NBest]:
        speaker = next(fusion for fusion in fusions if isinstance(fusion, DelayedFusion))
        split = self._language.split
        words = {name: split(text) for name, text in (references or {}).items() if text is not None}
        self.watches.append(BeamWatch(words, speaker, split))
        return super()._first_pass(emissions, [*fusions, self.watches[-1]], references, counters)


class WatchedRecognizer(Recognizer):
    """A recognizer of watched methods."""

    kind = WatchedMethod


def run(options: PruningErrorsOptions) -> int:
    """Run the job ``pruning-errors``; the exit code is 3 when audio could not be read."""
    recognizer = WatchedRecognizer(with_pretrained(options), options.method)
    utterances = spread(read_cuts(options.cuts, recognizer.source.wants), options.limit)
    split = recognizer.language.split
    references = {utterance.id: split(utterance.text or "") for utterance in utterances}
    counts: Counter[str] = Counter()
    for words in references.values():
        counts.update(words)
    kinds = WordKinds(counts, names_in(options.cuts), language=recognizer.language)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds.kinds if kind != "homophone"}
    whole, long = Counter[str](), 0
    for nbest in recognizer.transcribe(utterances):
        missing = missing_words(references[nbest.utterance], split(nbest[0].text))
        whole.update(words=len(references[nbest.utterance]), wrong=len(missing))
        fates = fates_of(recognizer, nbest.utterance, missing)
        if fates is None:
            long += 1
            continue
        for word, fate in zip(missing, fates):
            table[kinds.of_word(references[nbest.utterance][word])][fate] += 1
    _tell(options, whole, {kind: row for kind, row in table.items() if row}, long,
          recognizer.language.unit)
    return SKIPPED_SOME if recognizer.unreadable else 0


def fates_of(recognizer: WatchedRecognizer, utterance: str, missing: Sequence[int]) -> Optional[list[str]]:
    """Return what became of words of an utterance; None for one that was decoded in segments."""
    for watch in recognizer.methods[0].watches:
        fates = watch.fates(utterance, missing)
        if fates is not None:
            return fates
    return None


def missing_words(reference: Sequence[str], words: Sequence[str]) -> list[int]:
    """Return the numbers of the reference's words that a text has wrong or lacks."""
    return [number for number, good in enumerate(correct_words(reference, words)) if not good]


def _tell(options: PruningErrorsOptions, whole: Counter[str], table: Mapping[str, Counter[str]],
          long: int, unit: str) -> None:
    """Print the table and write it."""
    page = Page(f"Words that {options.method} has wrong")
    page.paragraph(
        f"{whole['wrong']:,} of {whole['words']:,} {unit} of the references are wrong in the best hypothesis "
        f"(insertions aside). {long} utterances were decoded in segments and not watched."
    )
    rows: list[list[Any]] = [[kind, *(row[fate] for fate in FATES)] for kind, row in table.items()]
    rows.append(["all", *(sum(row[fate] for row in table.values()) for fate in FATES)])
    page.table(["kind of word", *FATES], rows)
    print(page.markdown(), end="")
    if options.out:
        kinds = {kind: {fate: row[fate] for fate in FATES} for kind, row in table.items()}
        write_json(options.out, {"method": options.method, **whole, "unwatched": long, "kinds": kinds})
