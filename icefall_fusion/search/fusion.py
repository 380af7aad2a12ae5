"""Fusions: the base class, the rule that tells when delayed fusion acts, all fusions of one search.
Knows: beams, lengths of hypotheses, an n-gram for look-ahead. Must not know: which language model it is.

Delayed fusion acts for each utterance on its own (Hori et al. 2025, section 3). A search that knows the rule
need not ask after every frame, nor keep its utterances in step: each runs on to its own next stop, and all
that wait are scored in one call. The rule is two numbers, which compiled engines get as arguments.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Optional, Sequence

from torch import Tensor

from icefall_fusion.common.checks import check, is_number
from icefall_fusion.search.beam import Beam

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.text.tokens import AcousticTokens

#: Names of scores that an N-best list has of its own.
RESERVED_SOURCES = ("ctc", "rnnt", "words", "total")
_UNITS = (None, "words", "pieces")


class AheadTerms(NamedTuple):
    """Look-ahead: an n-gram ranks the words that are not scored yet (see fusion/ngram.py).

    ngram: over the acoustic pieces; weight: of its natural-log score; bonus: for a word that has begun;
    every: frames between two updates of the estimates.
    """

    ngram: PieceNgram
    weight: float
    bonus: float
    every: int


class StopRule(NamedTuple):
    """When an utterance stops for a fusion, a value without state.

    every: frames between two looks; 0: never, the utterance runs on to its end.
    unit: None: each look stops it; ``words`` or ``pieces``: if its shortest live hypothesis has begun more of
        them than at the last stop.
    ahead: the look-ahead, if there is one.
    late: frames after such a stop at which the utterance stops again, if it has not before; 0: it does not.
    """

    every: int
    unit: Optional[str] = None
    ahead: Optional[AheadTerms] = None
    late: int = 0

    @property
    def code(self) -> int:
        """Number of the unit for compiled engines: 0 none, 1 words, 2 pieces."""
        return _UNITS.index(self.unit)

    @property
    def first_length(self) -> int:
        """The length that counts as scored at the start: with one word begun none is closed, a piece is."""
        return 1 if self.unit == "words" else 0


class Fusion:
    """A score that joins the hypotheses of a search. By default it adds nothing.

    A search goes in one of two ways. Frame by frame it extends, merges and prunes, then calls `advance` and
    `fuse`. Where every fusion has a `stop_rule` (and those that stop, stop alike), it calls neither: each
    utterance runs on to its own next stop, and then `fuse_now` scores those that have stopped. Both ways must
    lead to the same scores. A subclass that changes `advance` or `fuse` must therefore change `stop_rule`
    too, or return None there.

    Attributes:
        source: name of its score in N-best lists, e.g. ``"llm"``; unique among the fusions of a search.
        weight: factor of its log-score, at least 0.
        word_bonus: added for each word, in nats.
        index: s, its column in ``beam.lm / words / state``; `begin` sets it.
        scores_extensions: whether it scores every extension (shallow fusion), by `extension_scores`.
        ceiling: the largest raw score that `extension_scores` can give. The search leaves out candidate
            pieces that cannot survive even so.
        piece_ngram, phrases: the back-off n-gram whose scores `extension_scores` gives, or the automata of
            phrases [B] (known after `begin`), if they are those of such: compiled engines read their tables.
    """

    source: str
    weight: float
    word_bonus: float = 0.0
    index: int = -1
    scores_extensions: bool = False
    ceiling: float = 0.0
    piece_ngram: Optional[PieceNgram] = None
    phrases: Optional[Sequence[Any]] = None

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch: keep ``index``, set ``beam.state[..., index]`` to the root nodes, reset counters.

        Args:
            beam: before the first frame.
            index: see the attribute.
            tokens: the acoustic vocabulary (`AcousticTokens`), or None.
            ids: names of the utterances.
        """
        self.index = index

    def stop_rule(self) -> Optional[StopRule]:
        """Return when an utterance stops for `fuse_now`; None: ask after every frame. Known after `begin`."""
        return None

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return raw log-probs [B, K, C] of extending each slot by ``pieces`` [B, C].

        Called only if `scores_extensions`, in frames where an extension can survive. Values are read only
        of utterances that are ``active`` [B] bool and of slots that are ``beam.asked``.
        """
        raise NotImplementedError

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order, after a frame in which a slot moved or grew.

        ``source`` [B, K] is the slot each slot came from; slots that ``grew`` [B, K] bool were extended by
        ``beam.last``. ``beam.state`` is already re-ordered (a grown slot has its parent's state); lm, words
        and fused of grown slots already hold the extension's score and word.
        """

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        """Change ``beam.lm / words / fused / state`` in place after frame ``frame``, if a condition holds.

        Args:
            beam: after this frame's pruning.
            frame: index of the encoder output frame, from 0.
            active: [B] bool, utterances that have this frame; other rows must not change.

        Returns:
            whether ``beam.fused`` may have changed.
        """
        return False

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Score the utterances [B] bool that the stop rule has stopped, whatever their frames."""

    def finish(self, beam: Beam) -> None:
        """Score the last words (and the end of sentence) of every live hypothesis, once, at the end."""

    def in_steps(self, beam: Beam, fires: Optional[Tensor], lands: Optional[Tensor] = None) -> Iterator[None]:
        """Do what `fuse_now` (``fires`` [B] bool on the host) or `finish` (None) does, in steps.

        A step ends while a model works and the host has nothing to do; resume it to collect the scores. Other
        utterances may be searched in between (see turns.py). By default all is one step. Where the rule has
        late stops, ``lands`` [B] bool on the host are the utterances that stand there.
        """
        if fires is None:
            self.finish(beam)
        else:
            self.fuse_now(beam, fires.to(beam.lens.device))
        yield from ()

    def for_groups(self, count: int) -> Optional[list[Fusion]]:
        """Return a fusion like this one for each of ``count`` groups of utterances searched in turns.

        Their counters are those of this one afterwards. None: it cannot serve several groups.
        """
        return None

    def stats(self) -> dict[str, float]:
        """Return the counters since `begin`: lm_forwards, lm_tokens_forwarded, lm_tokens_scored, ..."""
        return {}


def check_fusion(fusion: Fusion) -> None:
    """Refuse a fusion with a bad source, weight or bonus.

    Raises:
        ValueError: see `FusionSet`.
    """
    source, name = fusion.source, f"{type(fusion).__name__}."
    good = isinstance(source, str) and bool(source) and source not in RESERVED_SOURCES
    check(good, name + "source", f"be a name, none of {list(RESERVED_SOURCES)}", source)
    good = is_number(fusion.weight) and fusion.weight >= 0
    check(good, name + "weight", "be finite and at least 0", fusion.weight)
    check(is_number(fusion.word_bonus), name + "word_bonus", "be finite", fusion.word_bonus)


class FusionSet:
    """The fusions of one search.

    Attributes:
        members: in the order of their columns in the beam; shallow: those that score extensions.
        ranks: some weight or bonus is not 0, so that the order of the slots is not that of their CTC mass.
        disordered: a fusion has touched the scores since the last pruning left the slots sorted.

    Raises:
        ValueError: two fusions share a source, a source is reserved, a weight is negative or not finite, or a
            word bonus is asked for without a vocabulary.
    """

    def __init__(self, fusions: Sequence[Fusion], tokens: Optional[AcousticTokens]) -> None:
        check(isinstance(fusions, Sequence), "fusions", "be a sequence of fusions", type(fusions).__name__)
        self.members, self.tokens = list(fusions), tokens
        for number, fusion in enumerate(self.members):
            good = isinstance(fusion, Fusion)
            check(good, f"fusions[{number}]", "be a Fusion", type(fusion).__name__)
            check_fusion(fusion)
            check(tokens is not None or fusion.word_bonus == 0, f"fusion {fusion.source!r}: word_bonus",
                  "be 0 when the search has no tokens", fusion.word_bonus)
        sources = [fusion.source for fusion in self.members]
        check(len(set(sources)) == len(sources), "fusions", "have sources that differ", sources)
        self.ranks = any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in self.members)
        self.shallow = [fusion for fusion in self.members if fusion.scores_extensions]
        self.disordered = False

    def one_each(self) -> Optional[tuple[Optional[Fusion], Optional[Fusion]]]:
        """Return the shallow fusions of an n-gram and of phrases; None: there are others, or two of a kind.

        The scores of such an n-gram are log-probs.
        """
        ngrams = [one for one in self.shallow if one.piece_ngram is not None and one.ceiling == 0]
        phrases = [one for one in self.shallow if one.phrases is not None]
        good = len(ngrams) < 2 and len(phrases) < 2 and len(ngrams) + len(phrases) == len(self.shallow)
        return (next(iter(ngrams), None), next(iter(phrases), None)) if good else None

    def slack(self, beam: int) -> int:
        """Return by how many ranks language models may change who is among the best K (see candidates.py)."""
        return beam - 1 if self.ranks else 0

    def begin(self, beam: Beam, ids: Sequence[str]) -> None:
        """Start every fusion."""
        for index, fusion in enumerate(self.members):
            fusion.begin(beam, index, self.tokens, ids)

    def stop_rule(self) -> Optional[StopRule]:
        """Return the rule of all fusions together, None if there is no common one; known after `begin`."""
        rules = [fusion.stop_rule() for fusion in self.members]
        stopping = [rule for rule in rules if rule is None or rule.every or rule.ahead is not None]
        plain = {rule and rule._replace(ahead=None, late=0) for rule in stopping}
        special = [rule for rule in stopping if rule not in plain]
        if None in plain or len(plain) > 1 or len(special) > 1:
            return None
        return next(iter([*special, *plain]), StopRule(0))

    def carry(self, beam: Beam, moved_from: Tensor, gains: Sequence[Tensor],
              opened: Optional[Tensor]) -> None:
        """Move raw scores, words and states (not ``fused``), and add the gains of slots that grew.

        Args:
            moved_from: [B, K] slots as the fusions knew them when they were last called.
            gains: raw score [B, K] of each shallow fusion, 0 where a slot did not grow.
            opened: [B, K] words begun; None: there are no words.
        """
        beam.permute_scores(moved_from)
        for fusion, gain in zip(self.shallow, gains):
            beam.lm[..., fusion.index] += gain
            if opened is not None:
                beam.words[..., fusion.index] += opened

    def advance(self, beam: Beam, moved_from: Tensor, grew: Tensor) -> None:
        """Let the fusions follow a frame in which slots have moved or grown."""
        for fusion in self.members:
            fusion.advance(beam, moved_from, grew)

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> None:
        """Let the delayed fusions act, and note whether the slots may be out of order afterwards."""
        changed = [fusion.fuse(beam, frame, active) for fusion in self.members]
        self.disordered = self.ranks and any(changed)

    def in_steps(self, beam: Beam, fires: Optional[Tensor], lands: Optional[Tensor] = None) -> Iterator[None]:
        """Let the fusion that has stopped utterances [B] bool score them, or (None) all score the last words.

        Yields as `Fusion.in_steps` does.
        """
        for fusion in self.members:
            rule = fusion.stop_rule() if fires is not None else None
            if fires is None or (rule is not None and rule.every):
                yield from fusion.in_steps(beam, fires, lands)

    def finish(self, beam: Beam) -> None:
        """Let every fusion score the last words."""
        for fusion in self.members:
            fusion.finish(beam)
