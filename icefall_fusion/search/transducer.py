"""Time-synchronous beam search of transducers, batched over utterances: from encoder outputs to N-best lists.
Knows: arguments, what it asks of a transducer. Must not know: how a frame is searched, language models.

Beams, prefixes, fusions, triggers, look-ahead and N-best lists are those of the CTC search.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines.transducer import open_transducer
from icefall_fusion.search.export import export_nbests
from icefall_fusion.search.fusion import FusionSet
from icefall_fusion.search.search_input import (
    FLOATS,
    PrefixSearchOptions,
    SearchInput,
    check_tensor,
    check_utterances,
)

if TYPE_CHECKING:
    from icefall_fusion.acoustic.transducer import Transducer
    from icefall_fusion.nbest import NBest
    from icefall_fusion.search.fusion import Fusion
    from icefall_fusion.text.tokens import AcousticTokens

#: The source of the scores in N-best lists.
RNNT = "rnnt"
_ASKED = ("start", "vocab_size", "blank_id", "predict", "join")


@torch.no_grad()
def transducer_search(
    encoder: Tensor,
    lens: Tensor,
    model: Transducer,
    options: Optional[PrefixSearchOptions] = None,
    tokens: Optional[AcousticTokens] = None,
    fusions: Sequence[Fusion] = (),
    ids: Optional[Sequence[str]] = None,
) -> list[NBest]:
    """Search the most probable piece sequences (sum over alignments) of a batch of utterances.

    Time-synchronous beam search (Graves 2012, section 2.5). All ways to a prefix that the beam keeps are
    summed. With ``options.symbols`` 1 a frame emits blank or one piece, and the next frame follows:
    ``modified_beam_search`` of icefall (Kuang et al. 2022, arXiv 2206.13236, section 4). With more it emits
    up to so many pieces and then blank, as the transducer's loss sums alignments. Fusions join as in
    `ctc_prefix_search`. The result of an utterance does not depend on its batch. Runs on the device of
    ``encoder``.

    Args:
        encoder: [B, T, J] encoder outputs as the joiner takes them, any float type.
        lens: [B] frames of each utterance, 0..T.
        model: a transducer with a stateless predictor.
        options: groups, recover_mass and blank_skip left alone; none: the defaults.
        tokens: the vocabulary; none: hypotheses have no text, word times and word bonus.
        fusions: language models, see Fusion.
        ids: utterance names; none: "0", "1", ...

    Returns:
        One NBest per utterance, best first; scores "rnnt" (log-mass that the beam kept), one per fusion,
        "words" and "total". A word's time is that of the frames that most probably emit its pieces.

    Raises:
        ValueError: shapes, lengths or vocabulary do not fit, an option does not serve transducers, or an
            utterance (named) has outputs or scores that are no numbers.
    """
    options = PrefixSearchOptions() if options is None else options
    check_options(options)
    inputs = check_encoder(encoder, lens, model, tokens, ids)
    together = FusionSet(fusions, tokens)
    if not inputs.ids:
        return []
    with torch.autocast(encoder.device.type, enabled=False):  # masses need float32
        starts_word = None
        if tokens is not None and together.members:
            starts_word = torch.tensor(tokens.starts_word).to(encoder.device)
        beam = Beam.at_root(inputs, options.beam, starts_word, len(together.members))
        together.begin(beam, inputs.ids)
        engine = open_transducer(inputs, model, beam, options, together)
        for _ in engine.steps():
            pass
        if bool(engine.lost.any()):
            raise ValueError(_tell_lost(inputs.ids[int(engine.lost.int().argmax())], fusions))
        together.finish(beam)
        shift = options.frame_shift if options.word_times else None
        return export_nbests(beam, inputs, None, options.nbest or options.beam, shift, tokens,
                             together.members, RNNT, engine.peaks)


def _tell_lost(name: str, fusions: Sequence[Fusion]) -> str:
    sources = ", ".join(fusion.source for fusion in fusions)
    scores = f" and the scores of {sources}" if sources else ""
    return (f"the joiner's log-probs{scores} of utterance {name} must be numbers and leave a hypothesis "
            "above -inf, but some are NaN or +inf, or none is left")


def check_options(options: Any) -> None:
    """Refuse what does not serve transducers.

    Raises:
        ValueError: with the option.
    """
    good = isinstance(options, PrefixSearchOptions)
    check(good, "options", "be PrefixSearchOptions", type(options).__name__)
    good = options.engine in ("auto", "native", "torch")
    check(good, "engine", "be auto, native or torch for transducers", options.engine)
    for name, usual in (("recover_mass", False), ("blank_skip", None), ("groups", None)):
        value = getattr(options, name)
        check(value == usual, name, f"be {usual} for transducers", value)


def check_encoder(encoder: Tensor, lens: Tensor, model: Transducer, tokens: Optional[AcousticTokens],
                  ids: Optional[Sequence[str]]) -> SearchInput:
    """Check the arguments of a search; return them with the encoder's outputs in place of log-probs.

    Raises:
        ValueError: see `transducer_search`.
    """
    missing = [name for name in _ASKED if not hasattr(model, name)]
    check(not missing, "model", f"have {', '.join(_ASKED)}", f"without {missing}")
    check(len(model.start) >= 1, "model.start", "have an id at least", model.start)
    check_tensor(encoder, "encoder", "floating point outputs [B, T, J]", FLOATS)
    check(encoder.dim() == 3, "encoder", "have 3 dimensions [B, T, J]", tuple(encoder.shape))
    batch, frames, _ = encoder.shape
    if tokens is not None:
        rule = f"equal the {model.vocab_size} pieces of the model"
        check(tokens.size == model.vocab_size, "tokens.size", rule, tokens.size)
        rule = f"be the blank of the model ({model.blank_id})"
        check(tokens.blank_id == model.blank_id, "tokens.blank_id", rule, tokens.blank_id)
    names, lengths = check_utterances(lens, ids, batch, frames)
    encoder = encoder[:, : max(lengths, default=0)].float()
    lens = lens.to(device=encoder.device, dtype=torch.int64)
    live = torch.arange(encoder.shape[1], device=lens.device) < lens.unsqueeze(1)
    bad = (~torch.isfinite(encoder).all(2) & live).any(1)
    if bool(bad.any()):
        name = names[int(bad.int().argmax())]
        check(False, f"encoder outputs of utterance {name}", "be finite", "NaN or infinite")
    encoder = encoder.masked_fill(~live.unsqueeze(2), 0.0)  # a GPU asks the joiner of padding too
    return SearchInput(encoder, live.float(), live, lens, names, int(model.blank_id))
