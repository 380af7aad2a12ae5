"""What a language model that takes part in a search must do: the base class of all fusions.
Knows: beams, stop rules. Must not know: language models, tokenizers, how a frame is searched.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

from torch import Tensor

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.stop_rule import StopRule


class Fusion:
    """A score that joins the hypotheses of a search. By default it adds nothing.

    A search goes in one of two ways. Frame by frame it extends, merges and prunes, then calls `advance` and
    `fuse`. Where every fusion has a `stop_rule` (and at most one ever stops), it calls neither: each
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
        piece_ngram: the back-off n-gram whose scores `extension_scores` gives, if they are those of one:
            the compiled engines read its tables instead of asking.
    """

    source: str
    weight: float
    word_bonus: float = 0.0
    index: int = -1
    scores_extensions: bool = False
    ceiling: float = 0.0
    piece_ngram: Optional[PieceNgram] = None

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

        Called only if `scores_extensions`, in frames where an extension can survive. ``active`` [B] bool
        tells for which utterances. The values of other rows, and of slots that are not ``beam.asked``, are
        not read.
        """
        raise NotImplementedError

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order, after a frame in which a slot moved or grew.

        ``source`` [B, K] is the slot each slot came from, ``grew`` [B, K] bool tells which were extended by
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
        """Score what is left (last words, end of sentence) of every live hypothesis, once, at the end."""

    def stats(self) -> dict[str, float]:
        """Return the counters since `begin`: lm_forwards, lm_tokens_forwarded, lm_tokens_scored, ..."""
        return {}
