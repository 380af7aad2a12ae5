"""The beam search of transducers by tensors, on any device and with any fusion.
Knows: the order of work in a frame, a transducer's joiner and predictor. Must not know: language models.

In a frame a prefix has two masses: of alignments that may emit more pieces in this frame (open), and of those
that have ended it by a blank (done). A step asks the joiner once for all open prefixes of all utterances,
adds what ends to what is done, extends, merges and prunes. A prefix's only parent is the prefix without its
last piece, so the masses that meet are a slot's own and one extension of its parent's slot, as in the CTC
search; frame_step.py finds it, prunes and moves the beam.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Optional

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import DEAD_HASH, NO_PARENT_HASH, ROUNDING, Beam
from icefall_fusion.search.engines import check_serves, or_tensors
from icefall_fusion.search.engines.candidates import best_pieces, make_pairs
from icefall_fusion.search.engines.extension_scores import ExtensionScores
from icefall_fusion.search.engines.frame_step import Candidates, Frame, FrameStep, ranked
from icefall_fusion.search.engines.predictor import Contexts
from icefall_fusion.search.fusion import FusionSet

if TYPE_CHECKING:
    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput

_NEVER = -torch.inf
_RESCALE_EVERY = 16  # frames; a frame's best path is not known beforehand, as in a CTC search it is


def open_transducer(inputs: SearchInput, model: Transducer, beam: Beam, options: PrefixSearchOptions,
                    fusions: FusionSet) -> Any:
    """Return the engine of a search: compiled code where it serves, else tensors; arguments as of theirs.

    Raises:
        ValueError: an engine is asked for by name where it does not serve.
    """
    on_cpu = inputs.log_probs.device.type == "cpu"
    if options.engine == "torch" or (options.engine == "auto" and not on_cpu):
        return TransducerEngine(inputs, model, beam, options, fusions)

    def make() -> Any:
        from icefall_fusion.search.engines.transducer_native import NativeTransducer

        check_serves("native", options, fusions, inputs.log_probs.device)
        return NativeTransducer(inputs, model, beam, options, fusions)

    return or_tensors(options, make, lambda: TransducerEngine(inputs, model, beam, options, fusions))


def marked_frames(marks: Tensor, path: np.ndarray, most: int) -> np.ndarray:
    """Return the marks [nodes] along paths [n, longest] (-1 after the end), none after the next piece's."""
    frames = np.where(path < 0, most, marks.cpu().numpy()[path])
    return np.minimum.accumulate(frames[:, ::-1], 1)[:, ::-1]


def join_states(model: Transducer, encoder: Tensor, states: Tensor) -> Tensor:
    """Return the joiner's log-probs [n, V] in float32 of encoder outputs and predictor states, both [n, J].

    Raises:
        ValueError: one of the three has another size than the model's other parts say.
    """
    if states.shape != encoder.shape:
        rule = f"have as many values a frame as the model's predictor a context ({states.shape[-1]})"
        check(False, "encoder", rule, encoder.shape[-1])
    log_probs = model.join(encoder, states)
    if log_probs.shape != (len(encoder), model.vocab_size):
        rule = f"return log-probs of shape {(len(encoder), model.vocab_size)}"
        check(False, "model.join", rule, tuple(log_probs.shape))
    return log_probs.float()


class TransducerEngine:
    """One search over one batch: steps of a frame, and after each frame the fusions.

    Args:
        inputs: of the search; log_probs are the encoder's outputs.
        model: a transducer.
        beam: at the root; the search leaves it after the last frame.
        options: of the search.
        fusions: begun.
    """

    def __init__(self, inputs: SearchInput, model: Transducer, beam: Beam, options: PrefixSearchOptions,
                 fusions: FusionSet) -> None:
        self.encoder, self.live, self.model, self.beam, self.fusions = (
            inputs.log_probs, inputs.live, model, beam, fusions)
        self.symbols, self.pieces = options.symbols, int(model.vocab_size)
        self.limit = options.most_columns(self.pieces)
        self.step = FrameStep(beam, self.pieces, options.score_beam)
        self.extensions = ExtensionScores(fusions, beam)
        self.widens = bool(fusions.shallow) and fusions.ranks
        self.contexts = Contexts(model, beam)
        self.on_host = inputs.lens.device.type == "cpu"
        self.most = int(inputs.lens.max())
        self._outs: dict[int, Candidates] = {}
        nodes = beam.arena.row_size * (1 + self.encoder.shape[1] * self.symbols)
        # [nodes] of the arena: the frame in which most of a prefix's mass has come from its parent
        self.marks = torch.zeros(nodes, dtype=torch.int64, device=beam.node.device)
        self.slots = torch.arange(beam.node.numel(), device=beam.node.device)
        self.lost = torch.zeros_like(beam.lens, dtype=torch.bool)  # [B] a score was no number, or all were 0

    def peaks(self, inputs: SearchInput, utterances: np.ndarray, path: np.ndarray, *rest: np.ndarray
              ) -> np.ndarray:
        """Return the frame [n, longest] in which each piece of paths was emitted (see `piece_peaks`)."""
        return marked_frames(self.marks, path, self.most)

    def steps(self) -> Iterator[None]:
        """Search all frames in one step (see `CompiledSearch.steps`)."""
        self.run()
        yield from ()

    def run(self) -> None:
        """Search all frames; the fusions act after each."""
        for frame in range(self.most):
            self.beam.frame = frame
            self._search_frame(frame, self.live[:, frame])
            self.lost |= ~(self.beam.log_total.amax(1) > _NEVER)
            if self.fusions.members:
                self.fusions.fuse(self.beam, frame, self.live[:, frame])
        self.contexts.keep()

    def _search_frame(self, frame: int, active: Tensor) -> None:
        beam, running = self.beam, active.unsqueeze(1)
        if frame % _RESCALE_EVERY == 0:
            self.step.rescale(active)
        beam.log_nonblank = beam.log_total.masked_fill(~running, _NEVER)  # open
        beam.log_blank.copy_(beam.log_total.masked_fill(running, _NEVER))  # done
        encoder = self.encoder[:, frame]
        for _ in range(self.symbols):
            mass = self._join(encoder)
            if mass is None:
                return
            self._extend(mass, frame, active)
        if self.symbols > 1:
            mass = self._join(encoder, ends_alone=True)
            if mass is not None:
                torch.logaddexp(beam.log_blank, mass[..., 0], out=beam.log_blank)
            beam.log_total.copy_(beam.log_blank)
            self._drop_ends(active)

    def _drop_ends(self, active: Tensor) -> None:
        """Let prefixes die that are too far below the best now that all have ended the frame."""
        beam = self.beam
        if self.step.score_beam is None:
            return
        scores = ranked(beam.log_total, beam.fused)
        dead = (scores < scores.amax(1, keepdim=True) - self.step.score_beam) & active.unsqueeze(1)
        for values, never in ((beam.log_total, _NEVER), (beam.log_blank, _NEVER), (beam.hash, DEAD_HASH),
                              (beam.parent_hash, NO_PARENT_HASH)):
            values.masked_fill_(dead, never)

    def _join(self, encoder: Tensor, ends_alone: bool = False) -> Optional[Tensor]:
        """Return the masses [B, K, V] that open prefixes carry over by each piece and by blank.

        Args:
            encoder: [B, J], of this frame.
            ends_alone: return those of blank alone, [B, K, 1].

        Returns:
            None: no prefix is open (told on a CPU alone: asking a GPU is a wait).
        """
        beam = self.beam
        opened = beam.log_nonblank.reshape(-1)
        slots = self.slots
        if self.on_host:
            slots = (opened > _NEVER).nonzero().squeeze(1)
            if not len(slots):
                return None
        rows = torch.div(slots, beam.arena.beam, rounding_mode="floor")
        log_probs = join_states(self.model, encoder[rows], self.contexts.outputs(slots))
        if ends_alone:
            log_probs = log_probs[:, beam.blank : beam.blank + 1]
        log_probs = log_probs + opened[slots].unsqueeze(1)
        if len(slots) < len(opened):
            mass = log_probs.new_full((len(opened), log_probs.shape[1]), _NEVER)
            mass[slots] = log_probs
            log_probs = mass
        return log_probs.view(*beam.node.shape, -1)

    def _extend(self, mass: Tensor, frame: int, active: Tensor) -> None:
        """Go on by one step: blank, or one more piece.

        Args:
            mass: [B, K, V], see `_join`.
            frame: its number; active: [B] bool, utterances that have it.
        """
        beam = self.beam
        ended, incoming = self._merge(mass)
        out = self._candidates(min(beam.arena.beam, self.limit))
        open_mass, done = incoming, beam.log_blank
        if self.symbols == 1:
            open_mass = torch.logaddexp(ended, incoming)  # the frame is over for both
        else:
            done = torch.logaddexp(done, ended)
        own = torch.logaddexp(ended, beam.log_blank) + ROUNDING
        late = (incoming > own).long() * frame  # frames only rise
        self.marks.scatter_reduce_(0, beam.node.flatten(), late.flatten(), "amax")
        self._stay(out, open_mass, done)
        ranks = mass if not self.fusions.ranks else mass + beam.fused.unsqueeze(2)
        best = ranks.amax(1)  # [B, V]
        if self.widens:
            out = self._widen(out, best, active)
        piece = best_pieces(best, out.pairs.columns)[1]
        wanted = piece.unsqueeze(1).expand(-1, beam.arena.beam, -1)
        out.new_total.copy_(mass.gather(2, wanted).flatten(1))
        out.new_nonblank.copy_(out.new_total)
        self._prune(out, piece, frame, active)

    def _merge(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Take the masses [B, K] out of ``mass`` that end by blank, and that come from a slot's parent."""
        beam, flat = self.beam, mass.flatten(1)
        ended = mass[..., beam.blank].clone()
        mass[..., beam.blank] = _NEVER
        parent = self.step.parent_slots()
        own = (parent - 1) * self.pieces + beam.last
        own = torch.where(parent > 0, own, torch.full_like(own, beam.blank))  # there is no mass
        incoming = flat.gather(1, own)
        flat.scatter_(1, own, _NEVER)
        return ended, incoming

    @staticmethod
    def _stay(out: Candidates, open_mass: Tensor, done: Tensor) -> None:
        out.stay_nonblank.copy_(open_mass)
        out.stay_blank.copy_(done)
        torch.logaddexp(done, open_mass, out=out.stay_total)

    def _candidates(self, columns: int) -> Candidates:
        if columns not in self._outs:
            batch, beam = self.beam.node.shape
            pairs = make_pairs(beam, columns, None, self.encoder.device)
            self._outs[columns] = Candidates(batch, pairs, beam, self.encoder.device)
        return self._outs[columns]

    def _widen(self, stays: Candidates, best: Tensor, active: Tensor) -> Candidates:
        """Choose as many pieces as could enter the beam if shallow fusion were certain of them (exact)."""
        worst = ranked(stays.stay_total, self.beam.fused).amin(1)
        needed = worst - self.extensions.ceiling - ROUNDING
        counts = ((best >= needed.unsqueeze(1)) & (best > _NEVER)).sum(1)
        count = int((counts * active).max())  # a wait for the device
        out = self._candidates(min(self.limit, -(-count // 8) * 8))  # few different sizes
        out.masses[:, :, : out.beam] = stays.masses[:, :, : out.beam]
        return out

    def _prune(self, out: Candidates, piece: Tensor, frame: int, active: Tensor) -> None:
        fusions = self.fusions
        shift = torch.zeros_like(active, dtype=torch.float32).masked_fill_(~active, _NEVER).unsqueeze(1)
        scored = active if fusions.shallow else None
        scores = self.extensions.rank(out, piece, scored)
        unused = shift  # of a CTC frame
        now = Frame(unused, unused, shift, piece, unused, unused)
        chosen, source, grew = self.step.prune(now, out, scores)
        rows = self.beam.arena.rows
        self.marks.view(-1, self.beam.arena.row_size)[rows - 1] = frame
        self.contexts.follow(source, grew)
        if fusions.members:
            self.extensions.follow(out, chosen, source, grew, source)
