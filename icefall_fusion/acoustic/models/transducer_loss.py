"""Loss of a transducer head in bounded memory: exact, or pruned to a band of tokens a frame.
Knows: the head, frames, piece ids. Must not know: data, search, fusion, the encoder.

Legend: B utterances, T frames, U tokens, S tokens of a band, J joiner size, V pieces.

A cell is a frame and a number of tokens said. Its log-probs of V pieces are made a block of frames at a time,
and again in the backward pass. Of each cell two numbers stay: log-probs of the blank and of the next token.
torchaudio's loss sums over all alignments of them: it takes them as a vocabulary of two. k2 can do it too.
"""
from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from icefall_fusion.acoustic.models.transducer import TransducerHead
from icefall_fusion.common.processes import upload

#: Most log-probs that are in memory at once (64 MB of float32).
BLOCK = 1 << 24
_NEVER = -1e30  # log-prob of a cell outside the band; finite, so that sums with it are
_TINY = 1e-37


class RnntLoss(NamedTuple):
    """Sums over utterances: the loss, the simple loss or None, and the number of those without a frame."""

    loss: Tensor
    simple: Optional[Tensor]
    impossible: int


class _Texts(NamedTuple):
    """Targets of utterances that have frames, on their device."""

    padded: Tensor  # [B,U] int64
    lens: Tensor  # [B] int32, of the frames
    sizes: Tensor  # [B] int32, of the tokens


def rnnt_loss_sum(
    head: TransducerHead, encoder_out: Tensor, lens: Sequence[int], targets: Sequence[Sequence[int]],
    prune_range: Optional[int] = None,
) -> RnntLoss:
    """Return the loss of a batch (Graves 2012, arXiv 1211.3711), in float32.

    Under autocast the joiner's output layer, most of the work, is in its type, as in icefall.

    Args:
        head: predictor and joiner.
        encoder_out: [B,T,D].
        lens: frames of each utterance, on the host; those without one count zero.
        targets: pieces of each utterance, without blanks.
        prune_range: tokens a frame (more where a text could not pass them); 0: all, the exact loss. None:
            what the head's options say.
    """
    band = head.options.prune_range if prune_range is None else prune_range
    rows = [row for row, frames in enumerate(lens) if frames > 0]
    if not rows:
        nothing = sum((p.sum() * 0.0 for p in head.parameters()), encoder_out.sum() * 0.0)
        return RnntLoss(nothing, nothing if band > 0 else None, len(lens))
    device = encoder_out.device
    one = encoder_out.new_zeros(1, 1, dtype=torch.float32)
    kind = (one @ one).dtype  # what autocast makes of products, in all versions of PyTorch
    half = None if kind == torch.float32 else kind
    kept, sizes = [lens[row] for row in rows], [len(targets[row]) for row in rows]
    most = max(sizes)
    padded = [list(targets[row]) + [0] * (most - size) for row, size in zip(rows, sizes)]
    texts = _Texts(upload(padded, device, torch.long).view(len(rows), most),
                   upload(kept, device, torch.int32), upload(sizes, device, torch.int32))
    if len(rows) < len(lens):
        encoder_out = encoder_out[upload(rows, device)]
    with torch.autocast(device.type, enabled=False):
        encoder_out = encoder_out[:, : max(kept)].float()
        frames = head.project(encoder_out)
        before = head.predictor(head.histories(texts.padded))
        states = head.joiner.decoder_proj(before)
        simple, starts = None, None
        if band > 0:  # each frame can go on by one token less than the band holds
            band = min(most + 1, max(band, *(1 - -size // count for size, count in zip(sizes, kept)), 0))
            simple, starts = simple_loss(head, encoder_out, before, texts, band)
        else:
            band = most + 1
        cells = joined_cells(head, frames, states, texts.padded, starts, band, half)
        loss = _lattice_loss(head, cells, texts).sum()
    return RnntLoss(loss, simple, len(lens) - len(rows))


def joined_cells(
    head: TransducerHead, frames: Tensor, states: Tensor, targets: Tensor, starts: Optional[Tensor],
    band: int, half: Optional[torch.dtype] = None,
) -> Tensor:
    """Return log-probs [B,T,U+1,2] of the blank and of the next token; `_NEVER` outside the band.

    Args:
        frames: [B,T,J] projected; states: [B,U+1,J] projected.
        targets: [B,U].
        starts: [B,T] first cell of the band of each frame; None: 0.
        band: S, cells of a frame.
        half: type of the joiner's products; None: float32.
    """
    batch, length, _ = frames.shape
    tokens = F.pad(targets, (0, 1), value=head.blank_id)  # after the last token none comes: any id
    block = max(1, BLOCK // (batch * band * head.vocab_size))
    parts = []
    for begin in range(0, length, block):
        some = frames[:, begin : begin + block]
        first = None if starts is None else starts[:, begin : begin + block]
        made = (head, some, states, tokens, first, band, half)
        again = length > block and torch.is_grad_enabled()
        parts.append(checkpoint(_block, *made, use_reentrant=False) if again else _block(*made))
    return torch.cat(parts, dim=1)


def _block(
    head: TransducerHead, frames: Tensor, states: Tensor, tokens: Tensor, starts: Optional[Tensor], band: int,
    half: Optional[torch.dtype],
) -> Tensor:
    """Return `joined_cells` of a block of frames."""
    def join(left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, half, enabled=half is not None):
            return head.join(left, right)

    batch, length, size = frames.shape
    if starts is None:
        states, tokens = states[:, None], tokens[:, None].expand(batch, length, -1)
        return _two(join(frames[:, :, None], states), tokens, head.blank_id)
    cells = starts[:, :, None] + torch.arange(band, device=frames.device)  # [B,t,S]
    flat = cells.flatten(1)
    near = states.gather(1, flat[:, :, None].expand(-1, -1, size)).view(batch, length, band, size)
    near_tokens = tokens.gather(1, flat).view(batch, length, band)
    inner = _two(join(frames[:, :, None], near), near_tokens, head.blank_id)
    whole = inner.new_full((batch, length, states.shape[1], 2), _NEVER)
    return whole.scatter(2, cells[..., None].expand(-1, -1, -1, 2), inner)


def _two(log_probs: Tensor, tokens: Tensor, blank_id: int) -> Tensor:
    """Return log-probs [...,2] of the blank and of the tokens [...] of log-probs [...,V]."""
    return torch.stack((log_probs[..., blank_id], log_probs.gather(-1, tokens[..., None])[..., 0]), dim=-1)


def _lattice_loss(head: TransducerHead, cells: Tensor, texts: _Texts) -> Tensor:
    """Return -log of the sum over all alignments [B] for cells [B,T,U+1,2]."""
    if head.lattice_loss is not None:
        return head.lattice_loss(cells, texts.lens, texts.sizes)
    from torchaudio.functional import rnnt_loss

    ones = torch.ones_like(texts.padded, dtype=torch.int32)
    return rnnt_loss(cells.contiguous(), ones, texts.lens, texts.sizes, blank=0, reduction="none",
                     fused_log_softmax=False)


def simple_loss(
    head: TransducerHead, encoder_out: Tensor, before: Tensor, texts: _Texts, band: int
) -> tuple[Tensor, Tensor]:
    """Return the loss of a joiner that only adds two logits, summed, and the band that it finds.

    Kuang et al. 2022 (arXiv 2206.13236), sections 3 and 4.

    Args:
        encoder_out: [B,T,D]; before: predictor states [B,U+1,P].
        band: S.

    Returns:
        scalar; first cells of the band [B,T].
    """
    heard, said = head.simple_am_proj(encoder_out), head.simple_lm_proj(before)  # [B,T,V], [B,U+1,V]
    top_heard, top_said = (x.detach().amax(-1, keepdim=True) for x in (heard, said))
    total = torch.bmm((heard - top_heard).exp(), (said - top_said).exp().transpose(1, 2))
    total = (total + _TINY).log() + top_heard + top_said.transpose(1, 2)  # [B,T,U+1]
    tokens = F.pad(texts.padded, (0, 1), value=head.blank_id)
    frames = heard.shape[1]
    heard_token = heard.gather(2, tokens[:, None].expand(-1, frames, -1))
    said_token = said.gather(2, tokens[..., None])[..., 0][:, None]
    blank = heard[..., head.blank_id, None] + said[:, None, :, head.blank_id]
    cells = torch.stack((blank, heard_token + said_token), dim=-1) - total[..., None]
    with torch.enable_grad():
        known = cells if cells.requires_grad else cells.detach().requires_grad_()
        loss = _lattice_loss(head, known, texts).sum()
        (gradient,) = torch.autograd.grad(loss, known, retain_graph=True)
    occupied = -gradient.sum(-1)  # [B,T,U+1]
    starts = band_starts(occupied, texts.lens, texts.sizes, band)
    return (loss if cells.requires_grad else loss.detach()), starts


def band_starts(occupied: Tensor, lens: Tensor, sizes: Tensor, band: int) -> Tensor:
    """Return the first cells [B,T] of the bands that hold most of the alignments' probability.

    They begin at 0, never go back, leave no gap, and the last holds the end (Kuang et al. 2022, section 4.1).

    Args:
        occupied: probability [B,T,U+1] that an alignment passes a cell.
        lens: [B] frames; sizes: [B] tokens.
        band: S, at most U+1.
    """
    device, frames = occupied.device, torch.arange(occupied.shape[1], device=occupied.device)
    windows = F.pad(occupied.cumsum(-1), (1, 0))
    windows = windows[..., band:] - windows[..., :-band]  # [B,T,U+2-S]
    final = (sizes.long() + 1 - band).clamp(min=0)[:, None]
    late = torch.arange(windows.shape[-1], device=device) > final[..., None]
    starts = windows.masked_fill(late, -1.0).argmax(-1)
    starts = torch.where(frames >= lens[:, None] - 1, final, starts)
    starts = starts.flip(1).cummin(1).values.flip(1)
    room = (band - 1) * frames - starts  # may not fall from frame to frame, or a gap would open
    return (band - 1) * frames - room.flip(1).cummin(1).values.flip(1).clamp(min=0)
