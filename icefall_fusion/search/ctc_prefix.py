"""Exact CTC prefix beam search, batched over utterances: from log-probs to N-best lists.
Knows: arguments, the order of the steps. Must not know: how a frame is searched, language models.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

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
        return _search(inputs, options, tokens, together)


def _search(inputs: SearchInput, options: PrefixSearchOptions, tokens: Optional[AcousticTokens],
            together: FusionSet) -> list[NBest]:
    fusions = together.members
    starts_word = None
    if tokens is not None and fusions:
        starts_word = torch.tensor(tokens.starts_word, device=inputs.log_probs.device)
    beam = Beam.at_root(inputs, options.beam, starts_word, len(fusions))
    together.begin(beam, inputs.ids)
    search, plan = open_search(inputs, beam, options, together)
    search.run()
    beam.offset += (inputs.best.double() * inputs.live).sum(1)
    together.finish(beam)
    from icefall_fusion.search.export import export_nbests

    return export_nbests(beam, inputs, plan.map, options.nbest or options.beam,
                         options.frame_shift if options.word_times else None, tokens, fusions)
