"""Multi-head attention with rotary positions, shared by the encoder and the decoder.
Knows: tensors. Must not know: data, search, fusion, the meaning of frames or tokens.

Legend: B utterances, T frames or tokens, H heads, D model size, E head size.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10000.0


def masked_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``allowed`` (bool, any shape) and -30000 elsewhere.

    -30000 is finite in every float type, so a row without any allowed key gives no NaN. Beside an allowed key
    its weight underflows to an exact zero.
    """
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, -30000.0)


def rotary_table(start: int, length: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [length, E/2] of positions start..start+length-1 (Su et al. 2021, section 3.2)."""
    rates = ROTARY_BASE ** (
        -torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size
    )
    angles = torch.arange(start, start + length, device=like.device, dtype=torch.float32)[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B,H,T,E] by the angles of its positions (tables [T,E/2])."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention [B,H,Tq,E] x [B,H,Tk,E] with an additive bias [B,1,1 or Tq,Tk].

    Training on a CPU takes two plain products with the same values. The fused kernel's backward pass costs
    2-4 times as much there (measured at Tk = 76 to 300, bfloat16).
    """
    if not (q.device.type == "cpu" and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    with torch.autocast("cpu", enabled=False):
        batch, heads, queries, size = q.shape
        bias = bias.to(q.dtype).expand(batch, heads, bias.shape[2], k.shape[2]).flatten(0, 1)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=size**-0.5)
        return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(batch, heads, queries, size)


class SelfAttention(nn.Module):
    """Self-attention with rotary positions.

    Args:
        size: D.
        heads: H; D / H must be even.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: Optional[tuple[Tensor, Tensor]] = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output [B,T,D] and the keys and values [B,H,past+T,E] that it looked at.

        Keys are kept before they are turned: the tables ``rotary`` are of all past+T positions.
        """
        batch, length, size = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        seen = k, v
        q, k = rotate(q, *(table[-length:] for table in rotary)), rotate(k, *rotary)
        mixed = attend(q, k, v, bias).transpose(1, 2).reshape(batch, length, size)
        return self.out(mixed), seen


class CrossAttention(nn.Module):
    """Attention of tokens over encoder frames, without positions.

    Args:
        size: D.
        heads: H.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(size, size)
        self.kv = nn.Linear(size, 2 * size)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Return [B,U,D] for tokens x [B,U,D], frames ``memory`` [B,T,D] and bias [B,1,1,T]."""
        batch, tokens, size = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(batch, -1, 2, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, size))
