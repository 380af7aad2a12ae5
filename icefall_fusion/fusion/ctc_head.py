"""CTC and transducer of one encoder joined: CTC's prefix probability scores every extension of a search.
Knows: the Fusion base class, beams, CTC log-probs. Must not know: encoders, transducers, language models.

The score of a hypothesis is the log-probability that the labels of the utterance begin with its pieces,
summed over all alignments of all frames (Graves 2008, section 7.5.3; Watanabe et al. 2017, IEEE JSTSP 11(8),
section III-C: there with attention, here with a transducer, as in Sudo et al. 2022, arXiv 2212.10818). At
the end it is that of just these pieces: minus the CTC loss.

A search goes by frames, and a hypothesis that says nothing would never pay. So after each frame only those
alignments count that have said no further piece until ``slack`` frames before it: who lags behind CTC pays.

Legend, beside that of beam.py: t = 0..T counts frames that are over. Of a prefix ``ends`` and ``says`` [T+1]
are the log-masses of its alignments to the first t frames that end in blank, and in its last piece.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

import torch

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.search.fusion import Fusion, check_fusion

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.search.beam import Beam

CTC_HEAD = "ctc_head"  # source of the scores; "ctc" is that of a search of CTC itself
#: Nats: in a frame no piece, and of an utterance no text, is less probable than e to this.
LEAST_PIECE, LEAST_TEXT = -200.0, -1e4
#: Frames, and nats: what a hypothesis that lagged behind may win back by one piece.
SLACK, GAIN = 10, 20.0
_NEVER = -torch.inf


class CtcHeadFusion(Fusion):
    """The CTC head of the encoder that a transducer is searched with scores every extension.

    It is served by tensors. Its sums over frames are in float64, and are made for prefixes that could be
    extended alone.

    Args:
        log_probs: [B, T, V] CTC log-probs of the batch that is searched; None: to be set before a search.
        lens: [B] its frames.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is.
        word_bonus: added per word, in nats.
        source: name of the score in N-best lists.
        slack: frames by which a piece may come later than CTC says it.

    Raises:
        ValueError: a bad weight, bonus, source or slack; or (when a search begins) log-probs that are of
            another batch.
    """

    scores_extensions = True
    ceiling = GAIN

    def __init__(self, log_probs: Optional[Tensor], lens: Optional[Tensor], weight: float,
                 word_bonus: float = 0.0, source: str = CTC_HEAD, slack: int = SLACK) -> None:
        self.log_probs, self.lens, self.slack = log_probs, lens, slack
        self.weight, self.word_bonus, self.source = weight, word_bonus, source
        check_fusion(self)
        check(is_count(slack, 0), "CtcHeadFusion.slack", "be an integer, at least 0 frames", slack)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the log-probs are of another batch or vocabulary, or hold NaN.
        """
        self.index, device, batch = index, beam.node.device, len(ids)
        check(self.log_probs is not None and self.lens is not None, "CtcHeadFusion.log_probs", "be set", None)
        same = self.lens.shape == beam.lens.shape and bool((self.lens.to(device) == beam.lens).all())
        rule = f"be those of the search ({beam.lens.tolist()})"
        check(same, "CtcHeadFusion.lens", rule, self.lens.tolist())
        most, shape = int(beam.lens.max()), tuple(self.log_probs.shape)
        good = len(shape) == 3 and shape[0] == batch and shape[1] >= most
        good = good and (tokens is None or shape[2] == tokens.size)
        rule = f"be of shape [{batch}, {most} or more, {'V' if tokens is None else tokens.size}]"
        check(good, "CtcHeadFusion.log_probs", rule, shape)
        live = torch.arange(most, device=device) < beam.lens.unsqueeze(1)
        values = self.log_probs[:, :most].to(device).masked_fill(~live.unsqueeze(2), 0.0)
        bad = torch.isnan(values).flatten(1).any(1)
        if bool(bad.any()):
            name = ids[int(bad.int().argmax())]
            check(False, f"CTC log-probs of utterance {name}", "be numbers", "NaN")
        self._live, self._logs = live, values.clamp(min=LEAST_PIECE)
        self._probs = self._logs.double().exp().masked_fill_(~live.unsqueeze(2), 0.0)
        self._spoken = self._probs.sum(2) - self._probs[..., beam.blank]  # that a frame says a piece
        self._upto = torch.arange(most + 1, device=device) <= beam.lens.unsqueeze(1)
        self._lengths, self._ends = beam.lens.tolist(), beam.lens
        self._blanks = torch.zeros(batch, most + 1, dtype=torch.float64, device=device)
        self._blanks[:, 1:] = self._logs[..., beam.blank].double().cumsum(1)
        self._restart(beam, most)

    def _restart(self, beam: Beam, most: int) -> None:
        """Let all slots be the empty prefix."""
        batch, beams = beam.node.shape
        masses = self._blanks.new_full((batch, beams, 2, most + 1), _NEVER)
        masses[:, :, 0] = self._blanks.unsqueeze(1)
        # of each slot: [B,K,2,T+1] ends and says; [B,K,T+1] its score by what is over; [B,K,V] scores of its
        # extensions; these of the prefix whose last piece is `_of`, the slot's or, where it is `_late`, its
        # parent; [B,K] its own score now
        self._masses, self._own = masses, masses.new_zeros(batch, beams)
        self._rest = masses.new_zeros(batch, beams, most + 1)
        self._longer = masses.new_zeros(batch, beams, self._logs.shape[2])
        self._of = torch.full_like(beam.node, beam.blank)
        self._late = torch.zeros_like(beam.node, dtype=torch.bool)
        self._known = torch.zeros_like(self._late)  # whether `_longer` is made
        rows = torch.arange(batch, device=beam.node.device)
        self._rest[:] = self._scores_by_frame(rows, masses[:, 0], self._of[:, 0]).unsqueeze(1)

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        """Return log P(labels begin with prefix and piece) - the prefix's score [B, K, C]."""
        asked = beam.alive & beam.asked & active.unsqueeze(1)
        self._catch_up(beam, asked & self._late)
        self._extend(beam, asked & ~self._known)
        wanted = pieces.unsqueeze(1).expand(-1, beam.node.shape[1], -1)
        scores = (self._longer.gather(2, wanted) - self._own.unsqueeze(2)).clamp_(max=GAIN)
        return scores.masked_fill_((wanted == beam.blank) | ~asked.unsqueeze(2), 0.0).float()

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Follow prune and re-order (see ``Fusion.advance``)."""
        self._own = self._own.gather(1, source)
        self._longer = self._longer.gather(1, source.unsqueeze(2).expand_as(self._longer))
        at = source[:, :, None, None].expand_as(self._masses)
        self._masses = self._masses.gather(1, at)
        self._rest = self._rest.gather(1, source.unsqueeze(2).expand_as(self._rest))
        self._of, self._late, self._known = (x.gather(1, source) for x in (self._of, self._late, self._known))
        grown = self._longer.gather(2, beam.last.unsqueeze(2)).squeeze(2)
        self._own = torch.where(grew, torch.minimum(grown, self._own + GAIN), self._own)
        self._late, self._known = self._late | grew, self._known & ~grew

    def _catch_up(self, beam: Beam, which: Tensor) -> None:
        """Make the masses of prefixes in slots [B, K] bool from those of their parents."""
        rows, slots = which.nonzero(as_tuple=True)
        if not len(rows):
            return
        piece, before = beam.last[rows, slots], self._of[rows, slots]
        ends, says = self._masses[rows, slots].unbind(1)  # [n, T+1]
        carried = torch.where((piece == before).unsqueeze(1), ends, torch.logaddexp(ends, says))
        spoken = torch.zeros_like(ends)
        spoken[:, 1:] = self._logs[rows, :, piece].double().cumsum(1)
        says = _carry_on(carried, spoken)
        masses = torch.stack([_carry_on(says, self._blanks[rows]), says], 1)
        self._masses[rows, slots], self._of[rows, slots] = masses, piece
        self._rest[rows, slots] = self._scores_by_frame(rows, masses, piece)
        self._late = self._late & ~which

    def _scores_by_frame(self, rows: Tensor, masses: Tensor, last: Tensor) -> Tensor:
        """Return the log-mass [n, T+1] of alignments that say nothing after a prefix in the first t frames.

        Args:
            rows: [n] utterances; masses: [n, 2, T+1] of prefixes; last: [n] their last pieces.
        """
        ends, says = masses.masked_fill(~self._upto[rows].unsqueeze(1), _NEVER).unbind(1)
        whole = masses.gather(2, self._ends[rows].view(-1, 1, 1).expand(-1, 2, 1)).squeeze(2)
        best = torch.logaddexp(ends, says).amax(1, keepdim=True).clamp(min=LEAST_TEXT)
        ends, says = (ends - best).exp(), (says - best).exp()
        whole = (whole - best).exp().sum(1, keepdim=True)
        other = (self._spoken[rows] - self._probs[rows, :, last]).clamp(min=0.0)  # what is no repeat
        begun = ends[:, :-1] * self._spoken[rows] + says[:, :-1] * other
        later = torch.cat([begun.flip(1).cumsum(1).flip(1), torch.zeros_like(whole)], 1)
        return ((later + whole).log() + best).clamp(min=LEAST_TEXT)

    def _extend(self, beam: Beam, which: Tensor) -> None:
        """Make the scores of all extensions of prefixes in slots [B, K] bool, whose masses are known."""
        rows, slots = which.nonzero(as_tuple=True)
        if not len(rows):
            return
        masses = self._masses[rows, slots, :, :-1]  # [n, 2, T]: a piece is said in the next frame
        ends, says = masses.masked_fill(~self._live[rows].unsqueeze(1), _NEVER).unbind(1)
        both, last = torch.logaddexp(ends, says), self._of[rows, slots]
        best = both.amax(1, keepdim=True).clamp(min=LEAST_TEXT)  # -inf: all frames are taken
        shares = (both - best).exp()
        sums, first = [], 0
        for utterance, count in enumerate(which.sum(1).tolist()):
            length = self._lengths[utterance]
            some = shares[first : first + count, :length]
            sums.append(some @ self._probs[utterance, :length])
            first += count
        longer = torch.cat(sums)
        again = ((ends - best).exp() * self._probs[rows, :, last]).sum(1)
        longer.scatter_(1, last.unsqueeze(1), again.unsqueeze(1))  # a repeated piece needs a blank between
        self._longer[rows, slots] = (longer.log() + best).clamp_(min=LEAST_TEXT)
        self._known = self._known | which

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        """Let hypotheses pay for what CTC has said ``slack`` frames ago (see ``Fusion.fuse``)."""
        over = frame + 1 - self.slack
        if over <= 0:
            return False
        which = beam.alive & active.unsqueeze(1)
        self._catch_up(beam, which & self._late)
        self._set(beam, self._rest[..., over], which)
        return True

    def finish(self, beam: Beam) -> None:
        """Let the score of each hypothesis be that of its pieces alone, none behind them."""
        self._catch_up(beam, beam.alive & self._late)
        at = beam.lens.view(-1, 1, 1, 1).expand(*self._masses.shape[:3], 1)
        whole = self._masses.gather(3, at).squeeze(3).logsumexp(2).clamp(min=LEAST_TEXT)
        self._set(beam, whole, beam.alive)

    def _set(self, beam: Beam, scores: Tensor, which: Tensor) -> None:
        """Let slots [B, K] bool have these scores [B, K]."""
        change = (scores - self._own).masked_fill(~which, 0.0)
        self._own = self._own + change
        beam.lm[..., self.index] += change.float()
        if self.weight != 0:
            beam.fused += self.weight * change.float()


def _carry_on(entering: Tensor, along: Tensor) -> Tensor:
    """Return log-masses m [n, T+1] of ``m(t) = (m(t-1) + entering(t-1)) * p(t)``, 0 at the start.

    Args:
        entering: [n, T+1] log-masses; along: [n, T+1] log of the product of p(1..t).
    """
    sums = (entering - along)[:, :-1].logcumsumexp(1)
    masses = torch.full_like(entering, _NEVER)
    masses[:, 1:] = sums + along[:, 1:]
    return masses
