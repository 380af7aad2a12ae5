"""pyctcdecode's calls, answered by our search: `build_ctcdecoder` and the decoder that it returns.
Knows: pyctcdecode's names, defaults and folders. Must not know: how a search works, files of a run.

What differs by intent (README.md beside this file has figures): a hypothesis is one prefix with the exact sum
over its alignments, where pyctcdecode keeps a slot for those that end in a blank and another one for the
others; so a beam is worth up to twice as many hypotheses. Sentence marks such as ``<s>`` are silent. Frames
of a word go from the peak of its first label to that of its last.
"""
from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Collection, Iterable, Optional, Sequence, Union

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import write_text
from icefall_fusion.compat import alphabet as _alphabet
from icefall_fusion.compat import language_model as _models
from icefall_fusion.compat.alphabet import Alphabet
from icefall_fusion.compat.beams import (
    OutputBeam,
    OutputBeamMPSafe,
    best_pieces_of,
    output_beams,
    without_histories,
)
from icefall_fusion.compat.chunks import (
    DEFAULT_BEAM_WIDTH,
    DEFAULT_MIN_TOKEN_LOGP,
    DEFAULT_PRUNE_BEAMS,
    DEFAULT_PRUNE_LOGP,
    ChunkedDecoding,
    search_options,
)
from icefall_fusion.compat.language_model import (
    DEFAULT_ALPHA,
    DEFAULT_BETA,
    DEFAULT_HOTWORD_WEIGHT,
    DEFAULT_SCORE_LM_BOUNDARY,
    DEFAULT_UNK_LOGP_OFFSET,
    HotwordScorer,
    LanguageModel,
    LmState,
    MultiLanguageModel,
)
from icefall_fusion.compat.logits import check_logits, drop_improbable, log_probs_of, pad
from icefall_fusion.fusion.hotwords import HotWordFusion, make_automaton
from icefall_fusion.search import Fusion, ctc_prefix_search


class BeamSearchDecoderCTC(ChunkedDecoding):
    """A decoder of logits; see `build_ctcdecoder`.

    Args:
        alphabet: of the labels.
        language_model: None: the acoustic score alone.
    """

    _ALPHABET_SERIALIZED_FILENAME = "alphabet.json"
    _LANGUAGE_MODEL_SERIALIZED_DIRECTORY = "language_model"

    def __init__(self, alphabet: Alphabet,
                 language_model: Union[None, LanguageModel, MultiLanguageModel] = None) -> None:
        good = language_model is None or isinstance(language_model, (LanguageModel, MultiLanguageModel))
        check(good, "language_model", "be None or a LanguageModel", type(language_model).__name__)
        self._alphabet, self._language_model = alphabet, language_model
        self._tokens = alphabet.tokens()
        self._model_key = b"own"
        self._hot: tuple[Any, ...] = ()  # scorer, automaton

    @property
    def model_container(self) -> dict[bytes, Union[None, LanguageModel, MultiLanguageModel]]:
        """The language model by `_model_key`; it goes when the decoder goes."""
        return {self._model_key: self._language_model}

    @property
    def _order(self) -> int:
        return 0 if self._language_model is None else self._language_model.order

    @classmethod
    def clear_class_models(cls) -> None:
        """Do nothing: there are no models but those of decoders."""

    def cleanup(self) -> None:
        """Do nothing, see `clear_class_models`."""

    def reset_params(self, alpha: Optional[float] = None, beta: Optional[float] = None,
                     unk_score_offset: Optional[float] = None,
                     lm_score_boundary: Optional[bool] = None) -> None:
        """Change the weights of the language model; None leaves one; without a model nothing happens."""
        if self._language_model is not None:
            self._language_model.reset_params(alpha=alpha, beta=beta, unk_score_offset=unk_score_offset,
                                              score_boundary=lm_score_boundary)

    def decode(self, logits: Any, beam_width: int = DEFAULT_BEAM_WIDTH,
               beam_prune_logp: float = DEFAULT_PRUNE_LOGP, token_min_logp: float = DEFAULT_MIN_TOKEN_LOGP,
               hotwords: Optional[Iterable[str]] = None, hotword_weight: float = DEFAULT_HOTWORD_WEIGHT,
               lm_start_state: Optional[LmState] = None) -> str:
        """Return the best text of logits [T, V]; arguments and errors of `decode_beams`."""
        return self._decode([logits], beam_width, beam_prune_logp, token_min_logp, hotwords, hotword_weight,
                            lm_start_state, frames=False)[0][0].text

    def decode_beams(self, logits: Any, beam_width: int = DEFAULT_BEAM_WIDTH,
                     beam_prune_logp: float = DEFAULT_PRUNE_LOGP,
                     token_min_logp: float = DEFAULT_MIN_TOKEN_LOGP,
                     prune_history: bool = DEFAULT_PRUNE_BEAMS, hotwords: Optional[Iterable[str]] = None,
                     hotword_weight: float = DEFAULT_HOTWORD_WEIGHT,
                     lm_start_state: Optional[LmState] = None) -> list[OutputBeam]:
        """Return the hypotheses of logits, best first; each text once, its alignments and spellings summed.

        Args:
            logits: [T, V], a column for each label; log-probs, probabilities (rows sum to 1) or raw.
            beam_width: prefixes kept.
            beam_prune_logp: hypotheses this many nats below the best are dropped; below 0.
            token_min_logp: labels below it are not tried in a frame, the best one always is.
            prune_history: of hypotheses that differ in old words alone (those that an n-gram does not look
                back on) the best is returned; the search keeps all.
            hotwords: words, or phrases of which each word counts, that are paid while they are spelled.
            hotword_weight: nats of each.
            lm_start_state: LM state after earlier audio, as hypotheses have it (`LmState`).

        Raises:
            ValueError: logits do not fit the labels or are no numbers, or an argument is out of range.
        """
        beams = self._decode([logits], beam_width, beam_prune_logp, token_min_logp, hotwords, hotword_weight,
                             lm_start_state)[0]
        return without_histories(beams, self._order) if prune_history else beams

    def decode_batch(self, pool: Any, logits_list: Iterable[Any], beam_width: int = DEFAULT_BEAM_WIDTH,
                     beam_prune_logp: float = DEFAULT_PRUNE_LOGP,
                     token_min_logp: float = DEFAULT_MIN_TOKEN_LOGP, hotwords: Optional[Iterable[str]] = None,
                     hotword_weight: float = DEFAULT_HOTWORD_WEIGHT) -> list[str]:
        """Return the best text of each utterance; ``pool`` is not needed: a batch is searched at once."""
        found = self._decode(list(logits_list), beam_width, beam_prune_logp, token_min_logp, hotwords,
                             hotword_weight, frames=False)
        return [beams[0].text for beams in found]

    def decode_beams_batch(self, pool: Any, logits_list: Iterable[Any], beam_width: int = DEFAULT_BEAM_WIDTH,
                           beam_prune_logp: float = DEFAULT_PRUNE_LOGP,
                           token_min_logp: float = DEFAULT_MIN_TOKEN_LOGP,
                           prune_history: bool = DEFAULT_PRUNE_BEAMS,
                           hotwords: Optional[Iterable[str]] = None,
                           hotword_weight: float = DEFAULT_HOTWORD_WEIGHT) -> list[list[OutputBeamMPSafe]]:
        """Return the hypotheses of each utterance, without LM states; see `decode_batch`, `decode_beams`."""
        found = self._decode(list(logits_list), beam_width, beam_prune_logp, token_min_logp, hotwords,
                             hotword_weight)
        found = [without_histories(beams, self._order) for beams in found] if prune_history else found
        return [[OutputBeamMPSafe(b[0], *b[2:]) for b in beams] for beams in found]

    def _decode(self, logits: list[Any], beam: int, prune: float, least: float,
                hotwords: Optional[Iterable[str]], hotword_weight: float, state: Optional[LmState] = None,
                frames: bool = True) -> list[list[OutputBeam]]:
        """Return the hypotheses of a batch; with ``frames`` those of their words."""
        model = self._language_model
        rule = "be None for a decoder without a language model"
        check(state is None or model is not None, "lm_start_state", rule, state)
        rows, size = [], self._tokens.size
        for number, values in enumerate(logits):
            name = f"logits of utterance {number}" if len(logits) > 1 else "logits"
            rows.append(drop_improbable(log_probs_of(check_logits(values, size, name), name), least))
        options = search_options(beam, prune, frames)
        fusions = self._fusions(HotwordScorer.build_scorer(hotwords, hotword_weight), state)
        batch, lens = pad(rows, size)
        nbests = ctc_prefix_search(batch, lens, options, self._tokens, fusions)
        best = [best_pieces_of(row) if frames else None for row in rows]
        found = [output_beams(*each, self._tokens) for each in zip(nbests, [-prune] * len(rows), best)]
        if model is None:
            return found
        return [[b._replace(last_lm_state=model.state_after(state, b.text.split())) for b in beams]
                for beams in found]

    def _fusions(self, hot: HotwordScorer, state: Optional[LmState] = None) -> list[Fusion]:
        """Return what joins a new search: language models after ``state``, hot words."""
        model = self._language_model
        fusions = [] if model is None else model.fusions(state, self._tokens)
        if hot.words:
            if self._hot[:1] != (hot,):
                self._hot = hot, make_automaton(hot.words, self._tokens, hot.weight)
            fusions.append(HotWordFusion(self._hot[1]))
        return fusions

    def save_to_dir(self, filepath: str) -> None:
        """Write the decoder into a folder, in pyctcdecode's format."""
        folder = Path(filepath)
        if self._language_model is not None:
            self._language_model.save_to_dir(folder / self._LANGUAGE_MODEL_SERIALIZED_DIRECTORY, folder)
        write_text(folder / self._ALPHABET_SERIALIZED_FILENAME, self._alphabet.dumps())

    @classmethod
    def load_from_dir(cls, filepath: str, unigram_encoding: Optional[str] = None) -> BeamSearchDecoderCTC:
        """Read a decoder that pyctcdecode or `save_to_dir` has written.

        Raises:
            FileNotFoundError: there is no alphabet in the folder.
            ValueError: a file is not what it should be.
        """
        path = Path(filepath) / cls._ALPHABET_SERIALIZED_FILENAME
        if not path.is_file():
            raise FileNotFoundError(f"there is no alphabet of a decoder at {path}")
        folder = path.parent / cls._LANGUAGE_MODEL_SERIALIZED_DIRECTORY
        model = LanguageModel.load_from_dir(folder, path.parent, unigram_encoding)
        return cls(Alphabet.loads(path.read_text(encoding="utf-8")), model)

    @classmethod
    def load_from_hf_hub(cls, model_id: str, cache_dir: Union[None, str, os.PathLike] = None,
                         **options: Any) -> BeamSearchDecoderCTC:
        """Read a decoder from the Hugging Face Hub, or from its cache (see `load_from_dir`).

        Args:
            model_id: name of the repository, e.g. ``kensho/5gram-spanish-kenLM``.
            cache_dir: None: pyctcdecode's own, ``~/.cache/pyctcdecode``.
            options: of huggingface_hub's ``snapshot_download``, e.g. revision, local_files_only.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
            Errors of ``snapshot_download``: the repository cannot be had.
        """
        from huggingface_hub import snapshot_download

        cache = Path.home() / ".cache" / "pyctcdecode" if cache_dir is None else cache_dir
        return cls.load_from_dir(snapshot_download(model_id, cache_dir=cache, **options))


def build_ctcdecoder(
    labels: Sequence[str],
    kenlm_model_path: Union[None, str, os.PathLike] = None,
    unigrams: Optional[Collection[str]] = None,
    alpha: float = DEFAULT_ALPHA,
    beta: float = DEFAULT_BETA,
    unk_score_offset: float = DEFAULT_UNK_LOGP_OFFSET,
    lm_score_boundary: bool = DEFAULT_SCORE_LM_BOUNDARY,
    llm: Any = None,
    llm_weight: float = 0.4,
    llm_text: str = "as-is",
) -> BeamSearchDecoderCTC:
    """Return a decoder for the output of a CTC model.

    Args:
        labels: text of each column of the logits; blank is "", "[PAD]", "<pad>" or "_", else one more column
            at the end.
        kenlm_model_path: KenLM binary or ARPA file of an n-gram over words.
        unigrams: known words; None: those of the n-gram.
        alpha: weight of the n-gram's natural-log score.
        beta: added for each word, in nats.
        unk_score_offset: log10 added to the n-gram's score of a word that is not known.
        lm_score_boundary: whether start and end of a sentence are scored.
        llm: beyond pyctcdecode: an LLM in the search (Hori et al. 2025), see `LanguageModel`.
        llm_weight, llm_text: of it.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the n-gram, or kenlm for a binary, is missing.
        ValueError: labels repeat or are no texts; the n-gram is refused; a weight is not finite.
    """
    alphabet, model = Alphabet.build_alphabet(labels), None
    if kenlm_model_path is not None or llm is not None:
        model = LanguageModel(kenlm_model_path, unigrams, alpha, beta, unk_score_offset, lm_score_boundary,
                              llm, llm_weight, llm_text)
        model.check_coverage(alphabet.labels)
    return BeamSearchDecoderCTC(alphabet, model)


def install() -> None:
    """Let ``import pyctcdecode`` find this module in this process, for packages that import it themselves.

    A real pyctcdecode that is loaded already is replaced, with a warning.
    """
    own = sys.modules[__name__]
    if sys.modules.get("pyctcdecode", own) is not own:
        logging.warning("pyctcdecode was loaded already: it is replaced by %s", __name__)
    modules = {"": own, "alphabet": _alphabet, "constants": own, "decoder": own, "language_model": _models}
    for name, module in modules.items():
        sys.modules[".".join(filter(None, ("pyctcdecode", name)))] = module
