"""Job ``tune``: the weights and word bonuses with the fewest word errors on dev.
Knows: stored N-best scores, references, methods; decodes dev to confirm. Must not know: test sets, searches.

Weights come from stored N-best lists. Those of a fusion change the beam itself, so they are then confirmed by
decoding dev around the optimum.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Sequence, Union

import yaml
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, is_number
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import write_text
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.climb import Climb
from icefall_fusion.decode.job import DecodeOptions
from icefall_fusion.decode.method_names import (
    DEFAULT_WEIGHTS,
    choose_methods,
    parse_method,
    parse_methods,
)
from icefall_fusion.decode.recognizer import Batch, Recognizer
from icefall_fusion.decode.score_table import ScoreTable, coordinate_search
from icefall_fusion.decode.segments import Recognized
from icefall_fusion.decode.tune_hotwords import choose_weight
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.decode.weights import weights_of
from icefall_fusion.fusion.ctc_head import CTC_HEAD
from icefall_fusion.fusion.hotwords import HOT_WORDS
from icefall_fusion.nbest import read_nbests
from icefall_fusion.scoring.phrases import PhraseScores, score_phrases
from icefall_fusion.scoring.score import kept_language, read_texts
from icefall_fusion.scoring.wer import word_errors
from icefall_fusion.text.language import Language, language_of

FIRST_PASS_WEIGHT = 0.4  # where a climb by decoding starts too
_ACOUSTIC = ("ctc", "rnnt")  # sources of weight 1
_ILM = "ilm"
#: Where sources start whose weight is found by decoding: no list need have their scores.
_BY_DECODING = {HOT_WORDS: 0.0, _ILM: DEFAULT_WEIGHTS[_ILM], CTC_HEAD: DEFAULT_WEIGHTS[CTC_HEAD]}


@dataclass(frozen=True)
class TuneOptions:
    """Tune the weights of methods on dev.

    Args:
        nbest: files of N-best JSON lines of dev; lists of the same utterance are joined. A hypothesis needs
            the scores of all sources of a method to serve it.
        ref: references of dev: a manifest of cuts, JSON lines or lines of ``id text``.
        out: the YAML file of weights, for ``decode --weights``.
        methods: comma-separated or a list; "all" is the whole comparison.
        highest: largest weight of a language model or the attention decoder tried on N-best lists.
        bonus: word bonuses tried on N-best lists, from -bonus to +bonus; by decoding up to twice that.
        rounds: passes over all coordinates from each start.
        confirm: a decode job whose test_sets name dev (its methods and weights are not used): dev is decoded
            around the optimum of each method that has a fusion. Left out: no confirmation.
        confirm_rounds: passes over the coordinates by decoding, each with half the step of the one before.
        confirm_step: factor between neighboring weights tried by decoding, in the first pass.
        harm: percentage points of WER outside the listed phrases that hot words may cost. With confirm, whose
            ``hotwords`` names the list, the weight of ``hotwords`` is that of the best recall under this.
        language: ISO 639 code of the texts, see the job score; empty: as the files of N-best lists say.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    nbest: list[str]
    ref: str
    out: str
    methods: Union[str, list[str]] = "all"
    highest: float = 2.0
    bonus: float = 3.0
    rounds: int = 4
    confirm: Optional[DecodeOptions] = None
    confirm_rounds: int = 2
    confirm_step: float = 1.6
    harm: float = 0.1
    language: str = ""
    normalizer: str = ""

    def __post_init__(self) -> None:
        check(len(self.nbest) > 0, "TuneOptions.nbest", "name at least one file", self.nbest)
        check(self.highest > 0, "TuneOptions.highest", "be above 0", self.highest)
        check_at_least(0, self, "bonus")
        check_at_least(1, self, "rounds")
        check_at_least(0, self, "confirm_rounds")
        good = is_number(self.harm) and self.harm >= 0
        check(good, "TuneOptions.harm", "be at least 0 percentage points", self.harm)
        check(self.confirm_step > 1, "TuneOptions.confirm_step", "be above 1", self.confirm_step)
        parse_methods(self.methods)
        language_of(self.language, self.normalizer)


def run(options: TuneOptions) -> int:
    """Run the job ``tune``; the exit code is 3 when audio of dev could not be read."""
    references = read_texts(options.ref)
    language = language_of(options.language, options.normalizer, _kept(options))
    lists = [nbest for path in options.nbest for nbest in read_nbests(path)]
    weights: dict[str, dict[str, float]] = {}
    wer: dict[str, float] = {}
    hot: dict[str, dict[str, float]] = {}
    costs: dict[str, dict[str, float]] = {}
    code = 0
    scored = {source for nbest in lists for hypothesis in nbest for source in hypothesis.scores}
    for method in choose_methods(options.methods, _available(options, scored)):
        spec = parse_method(method)
        if not spec.sources:
            continue
        lacking = {_ILM, CTC_HEAD} & set(spec.sources) - scored
        if lacking and options.confirm is None:
            logging.warning("%s is skipped: no list has scores of %s, and nothing is decoded to confirm",
                            method, ", ".join(sorted(lacking)))
            continue
        decoded = {} if options.confirm is None else _BY_DECODING
        sources, acoustic = [one for one in spec.sources if one not in decoded], spec.acoustic
        scores = ScoreTable.make(lists, references, sources, language, acoustic)
        weights[method], errors = coordinate_search(scores, options.highest, options.bonus, options.rounds,
                                                    acoustic)
        costs[method] = scores.costs(weights[method])
        starts = {one: decoded[one] for one in spec.sources if one in decoded}
        weights[method] = {acoustic: 1.0, **starts, **weights[method]}
        wer[method] = 100.0 * errors / scores.words
        logging.info("%s: dev %s %.2f %% from N-best lists with %s", method, language.rate, wer[method],
                     weights[method])
    fused = [method for method in weights if parse_method(method).fusions]
    if options.confirm is not None and fused:
        tuned = {method: weights[method] for method in fused}
        confirmation = _Confirmation(options, options.confirm, tuned, language)
        for method in fused:
            simpler = [other for other in weights.values() if set(other) < set(weights[method])]
            found = confirmation.improve(method, weights[method], costs[method], simpler)
            weights[method], wer[method] = found
            if HOT_WORDS in weights[method]:
                told = confirmation.weigh_phrases(method, weights[method])
                weights[method], hot[method], wer[method] = told
            _write(options.out, weights, wer, hot)  # hours with a large LM: a kill loses one method at most
        code = SKIPPED_SOME if confirmation.skipped else 0
    print(_write(options.out, weights, wer, hot))
    return code


def _kept(options: TuneOptions) -> dict[str, str]:
    """Return the language that the files of N-best lists name, or that of the confirming decode's options."""
    confirm, kept = options.confirm, kept_language(*options.nbest)
    return kept if confirm is None else language_of(confirm.language, confirm.normalizer, kept).plain()


def _with_language(decode: DecodeOptions, weights: Any, language: Language) -> DecodeOptions:
    """Return the options of the confirming decode, in the language that is tuned in."""
    return replace(decode, weights=weights, language=language.name, normalizer=language.normalizer)


def _available(options: TuneOptions, scored: set[str]) -> set[str]:
    """Return the sources that N-best lists have scores of, and models if dev is decoded to confirm."""
    transducer = {"transducer"} if "rnnt" in scored else set()
    if options.confirm is None:
        lattices = {"graph", "word_ngram"} if "hlg" in scored else set()
        ahead = set() if options.methods == "all" else {"ngram"}  # look-ahead of a named method has no score
        return scored | lattices | ahead | transducer | {CTC_HEAD}
    models = options.confirm.named_models() | {"attention", CTC_HEAD}
    by_decoding = {HOT_WORDS, CTC_HEAD}  # no score is needed: dev is decoded with them
    return ((scored | by_decoding) & models) | options.confirm.k2.sources() | transducer


def _write(path: str, weights: Mapping[str, Mapping[str, float]], wer: Mapping[str, float],
           hot: Mapping[str, Mapping[str, float]]) -> str:
    """Write the YAML file and return its text."""
    rounded = {
        method: {
            source: round(float(weight), 4) for source, weight in values.items() if source not in _ACOUSTIC
        }
        for method, values in weights.items()
    }
    rates = {method: round(value, 3) for method, value in wer.items()}
    content: dict[str, Any] = {"weights": rounded, "dev_wer": rates}
    if hot:
        content["dev_hotwords"] = {method: dict(values) for method, values in hot.items()}
    head = '# Tuned on dev by: python -m icefall_fusion tune. "words" is the bonus a word, in nats.\n'
    text = head + yaml.safe_dump(content, sort_keys=False)
    write_text(path, text)
    return text


class _Confirmation:
    """Log-probs of dev, made once, decoded under any weights.

    Args:
        options: of the job.
        decode: the decode job whose test sets are dev.
        weights: by method, of the methods to confirm.
        language: of the references.
    """

    def __init__(
        self, options: TuneOptions, decode: DecodeOptions, weights: Mapping[str, Mapping[str, float]],
        language: Language,
    ) -> None:
        self.options, self._language = options, language
        self.recognizer = recognizer = Recognizer(_with_language(decode, weights, language), list(weights))
        wants = recognizer.source.wants
        utterances = [u for path in decode.test_sets.values() for u in read_cuts(path, wants)]
        utterances = spread(utterances, decode.limit)
        self.batches: list[Batch] = []
        self._best: dict[tuple[str, ...], list[dict[str, float]]] = {}  # by sources, of earlier methods
        for batch in tqdm(list(recognizer.batches(utterances)), desc="log-probs of dev", unit="batch"):
            self.batches += recognizer.emit(batch)
        self.skipped = {utterance.id for utterance, _ in recognizer.unreadable}
        self.references = {u.id: u.text or "" for u in utterances if u.id not in self.skipped}
        check(len(self.batches) > 0, "TuneOptions.confirm.test_sets", "have audio that can be read", 0)
        recognizer.models.warn_of_starts([text for text in self.references.values() if text])
        recognizer.models.remember()

    def improve(
        self, method: str, weights: Mapping[str, float], costs: Mapping[str, float],
        simpler: Sequence[Mapping[str, float]] = (),
    ) -> tuple[dict[str, float], float]:
        """Climb from the best of several starts, with ever smaller steps; return weights and WER in percent.

        A language model in the first pass changes which hypotheses survive. It mostly takes larger weights
        than a second pass over a beam that was pruned without it. So there are three more kinds of starts: a
        usual first-pass weight; the result of earlier methods with the same sources; and the weights of
        methods with fewer sources, beside usual ones. The last serve lattices: random paths need little of
        the graph's own score, by which they were drawn, but a beam search along the lattice needs it.

        Args:
            method: its name.
            weights: those from N-best lists.
            costs: nats that a source takes a word.
            simpler: weights of methods that have some of its sources.
        """
        seen: dict[tuple[float, ...], float] = {}
        names = tuple(weights)

        def wer(tried: Mapping[str, float]) -> float:
            ordered = {name: tried[name] for name in names}
            key = tuple(round(value, 9) for value in ordered.values())
            if key not in seen:
                seen[key] = self._wer(method, ordered)
                logging.info("%s: dev %s %.2f %% by decoding with %s", method, self._language.rate, seen[key],
                             ordered)
            return seen[key]

        usual = dict(weights)
        for fusion in parse_method(method).fusions:
            usual[fusion.source] = _BY_DECODING.get(fusion.source, FIRST_PASS_WEIGHT)
        options, fixed = self.options, (*_ACOUSTIC, HOT_WORDS)
        climb = Climb(wer, costs, fixed, options.confirm_step, options.confirm_rounds, 2 * options.bonus)
        simpler = [{"words": 0.0}, *(other for other in simpler if HOT_WORDS not in other)]
        starts = [weights, *(climb.with_more(other, usual) for other in simpler), *self._best.get(names, [])]
        best, rate = climb.from_best(starts)
        self._best.setdefault(names, []).append(best)
        return {name: best[name] for name in names}, rate

    def weigh_phrases(self, method: str, weights: Mapping[str, float]
                      ) -> tuple[dict[str, float], dict[str, float], float]:
        """Return weights with that of the hot words, what it is worth, and the WER (see `choose_weight`)."""
        phrases = [phrase for phrase, _ in self.recognizer.models.hotwords.phrases]

        def score(weight: float) -> PhraseScores:
            texts = self._texts(method, {**weights, HOT_WORDS: weight})
            return score_phrases(self.references, texts, phrases, self._language)

        weight, worth = choose_weight(score, self.options.harm)
        found = {**weights, HOT_WORDS: weight}
        return found, worth, self._wer(method, found)

    def _wer(self, method: str, weights: Mapping[str, float]) -> float:
        texts = self._texts(method, weights)
        return word_errors(self.references, texts, language=self._language).wer

    def _texts(self, method: str, weights: Mapping[str, float]) -> dict[str, str]:
        ready = self.recognizer.make_method(method, weights_of(method, {method: weights}))
        result = Recognized()
        for batch in self.batches:
            self.recognizer.decode(ready, batch, range(len(batch.segments)), result)
        result.drop(self.skipped)
        return {nbest.utterance: nbest[0].text for nbest in result.join()}
