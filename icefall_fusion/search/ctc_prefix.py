"""Exact CTC prefix beam search, batched over utterances: from log-probs to N-best lists.
Knows: arguments, the order of the steps. Must not know: how a frame is searched, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines import open_search
from icefall_fusion.search.fusion import FusionSet
from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput, check_input

if TYPE_CHECKING:
    from icefall_fusion.nbest import NBest
    from icefall_fusion.search.fusion import Fusion
    from icefall_fusion.text.tokens import AcousticTokens


@torch.no_grad()
def ctc_prefix_search(
    log_probs: Tensor,
    lens: Tensor,
    options: Optional[PrefixSearchOptions] = None,
    tokens: Optional[AcousticTokens] = None,
    fusions: Sequence[Fusion] = (),
    ids: Optional[Sequence[str]] = None,
    blank_id: Optional[int] = None,
) -> list[NBest]:
    """Search the most probable piece sequences (sum over alignments) of a batch of utterances.

    Exact CTC prefix beam search (Graves 2006; Hannun et al. 2014), with shallow fusion before and delayed
    fusion (Hori et al. 2025, section 2) after each pruning. The result of an utterance depends neither on its
    batch nor on the padding. Runs on the device of ``log_probs``.

    Args:
        log_probs: [B, T, V] natural-log probabilities, any float type; -inf is allowed.
        lens: [B] frames of each utterance, 0..T.
        options: see PrefixSearchOptions; none: the defaults.
        tokens: the vocabulary; none: hypotheses have no text, word times and word bonus.
        fusions: language models, see Fusion.
        ids: utterance names; none: "0", "1", ...
        blank_id: id of blank; none: that of ``tokens``, or 0.

    Returns:
        One NBest per utterance, best first; scores "ctc" (exact log-mass that the beam kept), one per fusion,
        "words" and "total".

    Raises:
        ValueError: shapes, lengths, blank or vocabulary do not fit; NaN or +inf among the log-probs, values
            clearly above 0 (logits), or a frame in which nothing is possible (the message names the
            utterance).
    """
    options = PrefixSearchOptions() if options is None else options
    good = isinstance(options, PrefixSearchOptions)
    check(good, "options", "be PrefixSearchOptions", type(options).__name__)
    inputs = check_input(log_probs, lens, blank_id, tokens, ids)
    together = FusionSet(fusions, tokens)
    if not inputs.ids:
        return []
    with torch.autocast(inputs.log_probs.device.type, enabled=False):  # masses need float32
        if (options.groups or 1) > 1 or (options.groups is None and inputs.log_probs.is_cuda):
            from icefall_fusion.search.turns import search_in_turns

            return search_in_turns(inputs, options, tokens, together)
        search = PrefixSearch(inputs, options, tokens, together)
        for _ in search.steps():
            pass
        return search.nbests()


class PrefixSearch:
    """A search that is ready to start: arguments as of `ctc_prefix_search`, checked."""

    def __init__(self, inputs: SearchInput, options: PrefixSearchOptions, tokens: Optional[AcousticTokens],
                 fusions: FusionSet) -> None:
        self.inputs, self.options, self.tokens, self.fusions = inputs, options, tokens, fusions
        starts_word = None
        if tokens is not None and fusions.members:
            starts_word = torch.tensor(tokens.starts_word).to(inputs.log_probs.device)
        self.beam = Beam.at_root(inputs, options.beam, starts_word, len(fusions.members))
        fusions.begin(self.beam, inputs.ids)
        self.search, self.plan = open_search(inputs, self.beam, options, fusions)

    def steps(self) -> Iterator[None]:
        """Search all frames and score the last words, in steps (see ``Fusion.in_steps``)."""
        yield from self.search.steps()
        self.beam.offset += (self.inputs.best.double() * self.inputs.live).sum(1)
        yield from self.fusions.in_steps(self.beam, None)

    def nbests(self) -> list[NBest]:
        """Return one N-best list per utterance, after all steps."""
        from icefall_fusion.search.export import export_nbests

        options = self.options
        return export_nbests(
            self.beam, self.inputs, self.plan.map, options.nbest or options.beam,
            options.frame_shift if options.word_times else None, self.tokens, self.fusions.members,
        )
