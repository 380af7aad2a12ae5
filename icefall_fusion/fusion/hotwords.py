"""Hot words (contextual biasing): phrases that hypotheses are paid for, at every extension.
Knows: the Fusion base class, phrases as automata, acoustic tokens. Must not know: language models, engines.

A hypothesis is paid a phrase's boost piece by piece while it spells the phrase, and gives back what it got
when it goes another way (as icefall's ``ContextGraph``; Zhao et al. 2019, arXiv 1906.09292, shallow fusion of
phrases). In the end its raw score is the sum of the boosts of all phrases that it has as whole words.
"""
from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence, Union

import torch

from icefall_fusion.common.checks import check, check_text
from icefall_fusion.common.files import PathLike
from icefall_fusion.fusion.base import asked_slots
from icefall_fusion.ngram.phrases import PhraseAutomaton, PhraseTensors, check_boost
from icefall_fusion.search.fusion import Fusion, StopRule, check_fusion

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam
    from icefall_fusion.text.tokens import AcousticTokens

#: Nats of a phrase for which none are given.
BOOST = 5.0
HOT_WORDS = "hotwords"  # source of their scores
#: Texts, or texts with boosts in nats; or such a list made ready by `make_automaton`.
Phrases = Union[Sequence[Union[str, "tuple[str, float]"]], PhraseAutomaton]


class HotWordFusion(Fusion):
    """Phrases join the search, at every extension; all engines read them themselves.

    Args:
        phrases: for all utterances, or by utterance id (then each utterance of a search needs a list, which
            may be empty). Boosts are in nats, for the whole phrase; thousands of phrases cost little.
        weight: factor of the boosts, at least 0; 0 leaves the search as it is, bit for bit.
        boost: of phrases that come without one.
        source: name of the score in N-best lists.
        word_bonus: added per word, in nats.

    Raises:
        TypeError: phrases that are no list. ValueError: a bad boost, weight or source, or (when a search
            begins) a phrase that is empty, comes twice or cannot be spelled; an utterance without a list.
    """

    scores_extensions = True

    def __init__(self, phrases: Union[Phrases, Mapping[str, Phrases]], weight: float = 1.0,
                 boost: float = BOOST, source: str = HOT_WORDS, word_bonus: float = 0.0) -> None:
        self.weight, self.source, self._boost, self.word_bonus = weight, source, boost, word_bonus
        check_fusion(self)
        check_boost(boost, "HotWordFusion.boost")
        self._by_utterance = isinstance(phrases, Mapping)
        self._lists = dict(phrases) if self._by_utterance else {None: phrases}
        for name, one in self._lists.items():
            _check_list(one, "phrases" if name is None else f"phrases[{name!r}]")
        self._made: dict[Any, PhraseAutomaton] = {}
        self._made_for: Any = None

    def with_phrases(self, phrases: Phrases, tokens: AcousticTokens) -> HotWordFusion:
        """Return one of the same settings with other phrases, made ready for searches with these tokens.

        Raises:
            TypeError, ValueError: see the class.
        """
        _check_list(phrases, "phrases")
        automaton = make_automaton(phrases, tokens, self._boost)
        return HotWordFusion(automaton, self.weight, self._boost, self.source, self.word_bonus)

    def for_groups(self, count: int) -> list[Fusion]:
        """Return copies (see ``Fusion.for_groups``)."""
        return [copy.copy(self) for _ in range(count)]

    def stop_rule(self) -> StopRule:
        """Return that no utterance has to stop for hot words."""
        return StopRule(0)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: see the class; or the search has no acoustic vocabulary.
        """
        check(tokens is not None, "tokens", "be passed to the search for hot words", None)
        if tokens is not self._made_for:
            self._made, self._made_for = {}, tokens
        self.index = index
        self.phrases = [self._automaton(name, tokens) for name in ids]
        different = list(dict.fromkeys(self.phrases))
        self._tensors = PhraseTensors(different, beam.node.device)
        self.phrase_bases = self._tensors.bases
        self.ceiling = max(float(automaton.most.max()) for automaton in different)
        starts = [self.phrase_bases[automaton] + automaton.start for automaton in self.phrases]
        beam.state[..., index] = torch.tensor(starts, device=beam.state.device).unsqueeze(1)

    def _automaton(self, utterance: str, tokens: AcousticTokens) -> PhraseAutomaton:
        """Return the automaton of an utterance's list, made once."""
        key = None
        if self._by_utterance:
            check(utterance in self._lists, "phrases", "have a list for each utterance", utterance)
            key = utterance
        phrases = self._lists[key]
        if id(phrases) not in self._made:  # utterances may share one; `_lists` keeps it
            self._made[id(phrases)] = make_automaton(phrases, tokens, self._boost)
        return self._made[id(phrases)]

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return the change of each hypothesis's boosts by each piece [B, K, C] (see `Fusion`)."""
        batch, beams = beam.node.shape
        scores = beam.lm.new_zeros(batch, beams, pieces.shape[1])
        slots = asked_slots(beam, active)
        if slots.numel():
            wanted = pieces[torch.div(slots, beams, rounding_mode="floor")]  # [n, C]
            nodes = beam.state[..., self.index].reshape(-1)[slots].unsqueeze(1)
            change = self._tensors.score(nodes, wanted, beam.arena.starts_word[wanted])
            scores.view(batch * beams, -1)[slots] = change.masked_fill(wanted == beam.blank, 0.0)
        return scores

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Let hypotheses that grew go on by their last piece (see ``Fusion.advance``)."""
        nodes = beam.state[..., self.index]
        nodes.copy_(torch.where(grew, self._tensors.next(nodes, beam.last), nodes))

    def finish(self, beam: Beam) -> None:
        """Take back what is on trial, and pay the phrases that end with the utterance."""
        nodes = beam.state[..., self.index]
        change = self._tensors.complete[nodes] - self._tensors.pending[nodes]
        change = change.masked_fill(~beam.alive, 0.0)
        beam.lm[..., self.index] += change
        if self.weight != 0:
            beam.fused += self.weight * change


def make_automaton(phrases: Phrases, tokens: AcousticTokens, boost: float = BOOST) -> PhraseAutomaton:
    """Spell phrases by acoustic pieces and make them ready for searches.

    Args:
        phrases: texts, or texts with boosts in nats.
        tokens: the acoustic vocabulary.
        boost: of phrases that come without one.

    Raises:
        ValueError: a phrase is empty, comes twice or cannot be spelled, or a boost is no number up to 1000.
    """
    if isinstance(phrases, PhraseAutomaton):
        check(phrases.size == tokens.size, "phrases", f"be over {tokens.size} acoustic pieces", phrases.size)
        return phrases
    spelled: dict[tuple[int, ...], float] = {}
    for row, entry in enumerate(phrases):
        text, own = (entry, boost) if isinstance(entry, str) else entry
        check_text(text, f"phrases[{row}]")
        check(bool(text.strip()), f"phrases[{row}]", "not be empty", text)
        check_boost(own, f"boost of the phrase {text!r}")
        ids = tuple(_spell(" ".join(text.split()), tokens))
        check(spelled.get(ids, own) == own, f"the phrase {text!r}", "have one boost", [spelled.get(ids), own])
        spelled[ids] = own
    head = None if tokens.delimiter is None else tokens.pieces.index(tokens.delimiter)
    return PhraseAutomaton(tokens.size, list(spelled.items()), head)


def _spell(text: str, tokens: AcousticTokens) -> Sequence[int]:
    """Return the pieces of a phrase, which must say just that."""
    try:
        ids = tokens.encode(text)
    except ValueError:
        ids = []
    good = bool(ids) and tokens.unk_id not in ids and tokens.decode(ids) == text
    check(good, "phrases", "be spelled by the acoustic pieces (mind upper and lower case)", text)
    return ids


def _check_list(phrases: Any, name: str) -> None:
    """Refuse what is no list of phrases."""
    if isinstance(phrases, PhraseAutomaton):
        return
    good = isinstance(phrases, Sequence) and not isinstance(phrases, (str, bytes))
    for entry in phrases if good else ():
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)
        if not (isinstance(entry, str) or pair):
            raise TypeError(f"{name} must hold texts, or texts with boosts, but one is {entry!r}")
    if not good:
        raise TypeError(f"{name} must be a list of phrases, but is {phrases!r}")


def read_hotwords(path: PathLike, boost: float = BOOST) -> list[tuple[str, float]]:
    """Return the phrases of a file with their boosts in nats: lines of ``phrase``, or ``phrase<TAB>boost``.

    Args:
        path: UTF-8 text; empty lines are passed over.
        boost: of lines that have none.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line has no phrase or a bad boost, or the file is no UTF-8 text; with its number.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file of hot words at {path}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    phrases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, tab, given = line.partition("\t")
        check(bool(text.strip()), f"{path}:{number}", "have a phrase before the boost", line)
        try:
            own = float(given) if tab else boost
        except ValueError:
            own = float("nan")
        check_boost(own, f"the boost in {path}:{number}")
        phrases.append((" ".join(text.split()), own))
    return phrases
