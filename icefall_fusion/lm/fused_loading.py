"""Whether a loaded model runs by fused kernels: what it must be like, and trials before it is relied on.
Knows: modules of transformers, the fused model, logging. Must not know: trees, search.
"""
from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from icefall_fusion.common.devices import kernels_run_on, load_kernels
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lm.fused import KERNELS, LEAST, LONGEST_ROW, FusedModel
from icefall_fusion.lm.loading import check_tree

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm

#: Classes of transformers whose layers are these: RMS norm, rotary positions, gated SiLU.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def use_fused_kernels(lm: CausalLm) -> Optional[str]:
    """Set ``lm.fused`` if the model allows it and its tree scores agree with plain forwards.

    Returns:
        None; or why not, with the traceback of what failed. Then ``lm.fused`` is None, and a failure (not a
        model of another kind) was logged as a warning.
    Raises:
        torch.OutOfMemoryError: memory ran out. The model would not fit with transformers' layers either.
    """
    try:
        check_fusible(lm.model)
        lm.fused = FusedModel(lm.model)
        with torch.cuda.device_of(lm.model.get_input_embeddings().weight):
            try_kernels(lm.fused)
        check_tree(lm)
        return None
    except Unavailable as reason:
        level = logging.WARNING if reason.unusual else logging.INFO
        logging.log(level, "%s runs as transformers runs it: %s", lm.name, reason)
        return str(reason)
    except torch.OutOfMemoryError:
        lm.fused = None
        raise
    except Exception:  # compilers and drivers raise anything
        lm.fused = None
        failure = traceback.format_exc()
        message = "fused kernels fail, so %s runs as transformers runs it (slower on the host)\n%s"
        logging.warning(message, lm.name, failure)
        return failure


def check_fusible(model: Any) -> None:
    """Refuse a model of transformers that cannot run by these kernels.

    Raises:
        Unavailable: with the reason.
    """
    name = type(model).__name__
    if name not in FAMILY or not type(model).__module__.startswith("transformers."):
        raise Unavailable(f"{name} is none of {', '.join(FAMILY)}")
    config = model.config
    if config.hidden_act != "silu":
        raise Unavailable(f"its activation is {config.hidden_act}")
    if config.hidden_size > LONGEST_ROW:
        raise Unavailable(f"its hidden size is above {LONGEST_ROW}")
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(devices) > 1 or len(kinds) > 1 or kinds - {torch.float32, torch.float16, torch.bfloat16}:
        raise Unavailable("its weights lie on several devices, or have several or other types")
    if not kernels_run_on(next(iter(devices))):
        raise Unavailable("it is not on a GPU")
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj,
                 mlp.up_proj, mlp.down_proj)
        for part in parts:
            if type(part) is not nn.Linear or type(part.weight) is not nn.Parameter:
                raise Unavailable(f"its layers are quantized or have adapters ({type(part).__name__})")
        size, rows = attention.head_dim, (config.num_attention_heads, *2 * [config.num_key_value_heads])
        shapes = [tuple(part.weight.shape) for part in parts[:3]]
        if size % 2 or shapes != [(count * size, config.hidden_size) for count in rows]:
            raise Unavailable(f"its heads have {size} entries and weights of {shapes}")
    if 2 * model.model.rotary_emb.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        raise Unavailable("only some dimensions of each head have rotary positions")
    load_kernels(KERNELS)


def try_kernels(fused: FusedModel) -> None:
    """Compare every form of attention that an event can need with plain arithmetic on random numbers.

    What compiles is also ready then.

    Raises:
        RuntimeError: a form is off.
    """
    like = fused.model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    groups, slots = fused.heads // fused.key_heads, 160
    for lines in (LEAST, 32, 64):
        width = max(1, lines // groups)
        if fused.lines(width, like.dtype) != lines:
            continue
        counts = [width, max(1, width - 1), 1]  # tokens of three utterances
        places = [u * width + w for u, count in enumerate(counts) for w in range(count)][::-1]
        padded = torch.zeros(3 * width, dtype=torch.int64)
        padded[places] = torch.arange(len(places))
        valid, padded = torch.tensor(places).to(like.device), padded.to(like.device)
        queries = random(len(places), fused.heads * fused.head_size)
        mask = torch.rand(3, 1, width, slots, generator=generator) < 0.3
        mask[..., 0] = True
        mask = mask.to(like.device)
        for utterances in (None, torch.tensor([3, 0, 2], device=like.device)):
            size = (3 if utterances is None else 4, slots + 40, fused.key_heads, fused.head_size)
            keys, values = random(*size), random(*size)
            output = fused.look(queries, keys, values, mask, utterances, padded, valid, 0.2).float()
            rows = slice(3) if utterances is None else utterances
            key, value = (x[rows, :slots].float() for x in (keys, values))  # [R, S, H, D]
            query = queries.float()[padded].view(3, width, fused.key_heads, groups, fused.head_size)
            scores = 0.2 * torch.einsum("rwhgd,rshd->rwhgs", query, key)
            shares = scores.masked_fill(~mask.view(3, width, 1, 1, slots), -torch.inf).softmax(-1)
            wanted = torch.einsum("rwhgs,rshd->rwhgd", shares, value).reshape(3 * width, -1)[valid]
            worst = float((output - wanted).abs().max())
            if not worst < (1e-3 if like.dtype == torch.float32 else 5e-2):  # nan too
                raise RuntimeError(f"attention of {lines} queries at once is {worst:.3g} off")

