"""The language models of a pyctcdecode decoder: n-grams over words, an LLM beside; hot words; weights, files.
Knows: pyctcdecode's parameters and folders, our fusions. Must not know: labels, searches, hypotheses.
"""
from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Iterable, NamedTuple, Optional, Sequence

from icefall_fusion.common.checks import check, is_number
from icefall_fusion.common.files import atomic_path, write_json, write_text
from icefall_fusion.fusion import DelayedFusion, HotWordFusion, ShortestHypothesis, WordNgramFusion
from icefall_fusion.fusion.word_ngram import word_automaton
from icefall_fusion.ngram.arpa import LN10
from icefall_fusion.ngram.phrases import MOST
from icefall_fusion.ngram.word_ngram import WordNgram
from icefall_fusion.search import Fusion

if TYPE_CHECKING:
    from icefall_fusion.text.tokens import AcousticTokens

DEFAULT_HOTWORD_WEIGHT = 10.0
DEFAULT_ALPHA, DEFAULT_BETA, DEFAULT_UNK_LOGP_OFFSET, DEFAULT_SCORE_LM_BOUNDARY = 0.5, 1.5, -10.0, True
_NUMBERS = ("alpha", "beta", "unk_score_offset")
_ATTRIBUTES, _UNIGRAMS, _LLM = "attrs.json", "unigrams.txt", "llm.json"
_ENDINGS = (".arpa", ".bin", ".binary", ".gz")
_MOST_WORDS = 200  # of a state


class LmState(NamedTuple):
    """What was said before: the last words."""

    words: tuple[str, ...]


class HotwordScorer(NamedTuple):
    """Hot words that are paid for while they are spelled; `build_scorer` makes it."""

    words: tuple[str, ...]
    weight: float

    @classmethod
    def build_scorer(cls, hotwords: Optional[Iterable[str]] = None,
                     weight: float = DEFAULT_HOTWORD_WEIGHT) -> HotwordScorer:
        """Return the scorer of a list of words, or of phrases of which each word counts.

        Args:
            hotwords: None: none. weight: nats of each.

        Raises:
            ValueError: they are no list of texts, or one is empty.
        """
        good = hotwords is None or isinstance(hotwords, Iterable) and not isinstance(hotwords, str)
        check(good, "hotwords", "be None or a list of texts", hotwords)
        phrases = list(hotwords or ())
        for phrase in phrases:
            good = isinstance(phrase, str) and bool(phrase.strip())
            check(good, "hotwords", "be texts, none empty", phrase)
        return cls(tuple(dict.fromkeys(word for phrase in phrases for word in phrase.split())), weight)


class LanguageModel:
    """Weights and models. Beams add ``alpha * ln P(words) + beta * words`` and, with an LLM, its share.

    Args:
        kenlm_model: path of a KenLM binary or ARPA file over words, or a ``kenlm.Model``, whose file is read
            again; None: there is none.
        unigrams: known words; None: those of the n-gram.
        alpha: weight of the n-gram's natural-log score.
        beta: added for each word, in nats.
        unk_score_offset: log10 added to the n-gram's score of a word that is not known.
        score_boundary: whether start and end of a sentence are scored.
        llm: a `CausalLm`, or the path or name of one: joins by delayed fusion (Hori et al. 2025).
        llm_weight: of its natural-log score.
        llm_text: how it sees words: as-is, lower or sentence.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: see `WordNgram`; a weight is not finite.
    """

    def __init__(self, kenlm_model: Any = None,
                 unigrams: Optional[Collection[str]] = None, alpha: float = DEFAULT_ALPHA,
                 beta: float = DEFAULT_BETA, unk_score_offset: float = DEFAULT_UNK_LOGP_OFFSET,
                 score_boundary: bool = DEFAULT_SCORE_LM_BOUNDARY, llm: Any = None, llm_weight: float = 0.4,
                 llm_text: str = "as-is") -> None:
        check(kenlm_model is not None or llm is not None, "language model", "be an n-gram or an LLM", None)
        self.alpha, self.beta, self.unk_score_offset = alpha, beta, unk_score_offset
        self.score_boundary = score_boundary
        self._check()
        path = getattr(kenlm_model, "path", kenlm_model)  # kenlm's own model has it as bytes
        self.ngram = None if path is None else WordNgram(os.fsdecode(path), unigrams, units=False)
        self.llm_path = str(llm) if isinstance(llm, (str, os.PathLike)) else None
        self.llm, self.llm_weight, self.llm_text = llm, llm_weight, llm_text
        if self.llm_path is not None:
            from icefall_fusion.lm import CausalLm

            self.llm = CausalLm.from_pretrained(self.llm_path)
        self._vocabulary: tuple[Any, ...] = ()  # tokens, score, fusion
        self.words = None if self.ngram is None else self.ngram.known_words()
        if self.ngram is not None and not self.words:
            logging.warning("the known words of %s are not told (unigrams): words are not guided to them",
                            self.ngram.name)

    def _check(self) -> None:
        for name in _NUMBERS:
            check(is_number(getattr(self, name)), name, "be finite", getattr(self, name))
        boundary = self.score_boundary
        check(isinstance(boundary, bool), "score_boundary", "be True or False", boundary)
        check(self.unk_score_offset <= 0, "unk_score_offset", "be at most 0", self.unk_score_offset)

    @property
    def order(self) -> int:
        """The longest n of the n-gram, 0 without one."""
        return 0 if self.ngram is None else self.ngram.order

    def reset_params(self, **values: Any) -> None:
        """Change alpha, beta, unk_score_offset or score_boundary; None leaves a value.

        Raises:
            ValueError: another name, or a bad value.
        """
        unknown = sorted(set(values) - {*_NUMBERS, "score_boundary"})
        check(not unknown, "reset_params", f"name one of {[*_NUMBERS, 'score_boundary']}", unknown)
        before = dict(vars(self))
        vars(self).update({name: value for name, value in values.items() if value is not None})
        try:
            self._check()
        except ValueError:
            vars(self).update(before)
            raise

    def get_start_state(self) -> LmState:
        """Return the state before the first word."""
        return LmState(())

    def state_after(self, state: Optional[LmState], words: Sequence[str]) -> LmState:
        """Return the state after more words."""
        return LmState((*(state.words if state is not None else ()), *words)[-_MOST_WORDS:])

    def fusions(self, state: Optional[LmState], tokens: AcousticTokens, share: float = 1.0,
                suffix: str = "") -> list[Fusion]:
        """Return what joins a search over ``tokens`` after ``state``.

        Args:
            state: None: nothing was said before. tokens: the acoustic vocabulary.
            share: factor of all weights; suffix: of the names of the scores.
        """
        self._check()
        good = state is None or isinstance(state, LmState)
        check(good, "lm_start_state", "be None or the LM state of a hypothesis", state)
        earlier, found = " ".join(state.words) if state else "", []
        trigger, boundary = ShortestHypothesis(), self.score_boundary
        if self.ngram is not None:
            oov = max(self.unk_score_offset * LN10, -MOST)
            self.ngram.oov_score = 0.0 if self.words else oov
            found.append(WordNgramFusion(self.ngram, share * self.alpha, share * self.beta, trigger,
                                         prompt=earlier or None, boundary=boundary,
                                         source="wordngram" + suffix))
            if self.words:
                if self._vocabulary[:2] != (tokens, oov):
                    self._vocabulary = tokens, oov, word_automaton(self.words, tokens, oov, units=False)
                found.append(HotWordFusion(self._vocabulary[2], share * self.alpha, source="oov" + suffix))
        if self.llm is not None:
            bonus = 0.0 if found else share * self.beta
            eos = boundary and self.llm.eos_id is not None
            found.append(DelayedFusion(self.llm, share * self.llm_weight, bonus, trigger, self.llm_text,
                                       earlier or None, eos, source="llm" + suffix))
        return found

    def check_coverage(self, labels: Sequence[str]) -> None:
        """Warn where many letters of the known words are in no label: they are of another alphabet."""
        letters = set("".join(self.words or ()))
        if letters and len(letters - set("".join(labels))) > 0.2 * len(letters):
            missing = sorted(letters - set("".join(labels)))[:10]
            logging.warning("unigrams and labels are of different alphabets: no label has %s", missing)

    def save_to_dir(self, path: Path, beside: Path) -> None:
        """Write the n-gram and its weights into a folder ``path``, the LLM's name beside it.

        Raises:
            ValueError: the LLM was not given by its path.
        """
        if self.llm is not None:
            rule = "be given by its path where the decoder is to be saved"
            check(self.llm_path is not None, "llm", rule, type(self.llm).__name__)
            values = {"path": self.llm_path, "weight": self.llm_weight, "text": self.llm_text}
            write_json(beside / _LLM, {**values, **self._attributes()})
        if self.ngram is None:
            return
        source = self.ngram.path
        write_json(path / _ATTRIBUTES, self._attributes())
        write_text(path / _UNIGRAMS, "".join(f"{word}\n" for word in self.words or ()))
        if not (path / source.name).exists() or not source.samefile(path / source.name):
            with atomic_path(path / source.name) as temporary:
                shutil.copyfile(source, temporary)

    def _attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_NUMBERS, "score_boundary")}

    @classmethod
    def load_from_dir(cls, path: Path, beside: Path,
                      encoding: Optional[str] = None) -> Optional[LanguageModel]:
        """Read what `save_to_dir` or pyctcdecode has written; None: there is no language model.

        Raises:
            ValueError: a file is missing in the folder, too much, or not what it should be.
        """
        llm = _read_values(beside / _LLM, ("path", "weight", "text")) if (beside / _LLM).is_file() else None
        options = {} if llm is None else {f"llm_{name}": llm.pop(name) for name in ("weight", "text")}
        options |= {} if llm is None else {"llm": llm.pop("path")}
        if not path.is_dir():
            return None if llm is None else cls(**llm, **options)
        files = {file.name for file in path.iterdir() if not file.name.startswith((".", "__"))}
        models = sorted(files - {_ATTRIBUTES, _UNIGRAMS})
        good = {_ATTRIBUTES, _UNIGRAMS} <= files and len(models) == 1 and models[0].endswith(_ENDINGS)
        rule = f"hold {_ATTRIBUTES}, {_UNIGRAMS} and an n-gram ({', '.join(_ENDINGS)})"
        check(good, f"the folder {path}", rule, sorted(files))
        unigrams = (path / _UNIGRAMS).read_text(encoding=encoding or "utf-8").splitlines()
        return cls(path / models[0], unigrams or None, **_read_values(path / _ATTRIBUTES), **options)


class MultiLanguageModel:
    """The mean of several models' scores, as pyctcdecode has it.

    Args:
        language_models: two at least. Their parameters are their own.

    Raises:
        ValueError: they are fewer, or something else.
    """

    words: Optional[list[str]] = None

    def __init__(self, language_models: Sequence[LanguageModel]) -> None:
        models = list(language_models)
        good = len(models) > 1 and all(isinstance(model, LanguageModel) for model in models)
        check(good, "language_models", "be two LanguageModels at least", [type(m).__name__ for m in models])
        self._models = models

    @property
    def order(self) -> int:
        """The longest n of the n-grams."""
        return max(model.order for model in self._models)

    def get_start_state(self) -> LmState:
        """Return the state before the first word."""
        return LmState(())

    def state_after(self, state: Optional[LmState], words: Sequence[str]) -> LmState:
        """Return the state after more words."""
        return self._models[0].state_after(state, words)

    def fusions(self, state: Optional[LmState], tokens: AcousticTokens) -> list[Fusion]:
        """Return what joins a search (see `LanguageModel.fusions`)."""
        share = 1 / len(self._models)
        return [fusion for number, model in enumerate(self._models)
                for fusion in model.fusions(state, tokens, share, f"-{number}")]

    def reset_params(self, **values: Any) -> None:
        """Refuse: each of the models has parameters of its own."""
        check(not any(value is not None for value in values.values()), "reset_params",
              "be called on one of the models of a MultiLanguageModel", values)

    def save_to_dir(self, path: Path, beside: Path) -> None:
        """Refuse: pyctcdecode has no folder of several models."""
        rule = "be one LanguageModel where the decoder is to be saved"
        check(False, "language_model", rule, f"{len(self._models)} models")


def _read_values(path: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Read the weights of a language model, and ``more``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    wanted = {*_NUMBERS, "score_boundary", *more}
    good = isinstance(values, dict) and set(values) == wanted
    check(good, f"{path}", f"have the fields {sorted(wanted)}", values)
    return values
