"""Whether a loaded model runs by fused kernels: what it must be like, and trials before it is relied on.
Knows: modules of transformers, the fused model, logging. Must not know: trees, search.
"""
from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from icefall_fusion.common.devices import kernels_run_on, load_kernels, refuse_switched_off
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lm.fused import KERNELS, LEAST, LONGEST_ROW, FusedModel
from icefall_fusion.lm.fused_event import EventInputs
from icefall_fusion.lm.graphs import graphs_of
from icefall_fusion.lm.loading import check_tree
from icefall_fusion.lm.products import gpu_clock

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm

#: Classes of transformers whose layers are these: RMS norm, rotary positions, gated SiLU.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: Tokens of an event whose products are timed, the usual ones first (see `Products.tune`).
COUNTS = (320, 256, 384, 192, 448, 128, 512, 64, 576, 640)
TUNING_SECONDS = 5.0
GRAPHS = "icefall_fusion.lm.graphs"  # its name for `WITHOUT_KERNELS`


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
            if lm.device.type == "cuda":
                lm.fused.products.tune(lm.fused.shapes(), COUNTS, TUNING_SECONDS, gpu_clock)
        check_tree(lm)
        if lm.device.type == "cuda":
            use_graphs(lm)
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


def use_graphs(lm: CausalLm) -> None:
    """Let events of a fused model be replayed as graphs, if its scores by them agree with plain forwards.

    Without graphs its products go by cuBLAS: launches of other forms keep the host busier than the GPU.
    """
    try:
        refuse_switched_off(GRAPHS)
        lm.fused.graphs = graphs = graphs_of(lm.fused, after=0)
        for _ in range(2):  # sizes come again, with keys and values elsewhere
            check_tree(lm)
        if graphs.failure is None:
            graphs.after = 1
            return
    except Unavailable as reason:
        logging.warning("each kernel of %s is launched by itself: %s", lm.name, reason)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # drivers raise anything
        message = "CUDA graphs fail, so each kernel of %s is launched by itself"
        logging.warning(message, lm.name, exc_info=True)
    lm.fused.graphs, lm.fused.products.on = None, False


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

    groups, slots, capacity = fused.heads // fused.key_heads, 160, 200
    for lines in (LEAST, 32, 64):
        width = max(1, lines // groups)
        if fused.lines(width, like.dtype) != lines:
            continue
        counts = torch.tensor([width, 0, max(1, width - 1), 1])  # tokens of four utterances
        used = torch.tensor([slots, slots, 70, 1])
        ends = counts.cumsum(0)
        owner = torch.arange(4).repeat_interleave(counts)
        seen = torch.rand(len(owner), slots, generator=generator) < 0.3
        seen[:, 0] = True
        keys, values = (random(4, capacity, fused.key_heads, fused.head_size) for _ in range(2))
        rows = torch.stack([ends - counts, ends, used, capacity * torch.arange(4)], 1)
        event = EventInputs(
            *4 * [rows], torch.tensor([keys.data_ptr(), values.data_ptr()]).to(like.device),
            rows.to(like.device), _as_bits(seen).to(like.device), None, width,
        )
        queries = random(len(owner), fused.heads * fused.head_size)
        output = fused.look(queries, event, 0, 0.2).float()
        seen = seen & (torch.arange(slots) < used[owner, None])
        query = queries.float().view(len(owner), fused.key_heads, groups, fused.head_size)
        key, value = (x[:, :slots].float()[owner.to(like.device)] for x in (keys, values))  # [T, S, H, D]
        scores = 0.2 * torch.einsum("thgd,tshd->thgs", query, key)
        shares = scores.masked_fill(~seen.to(like.device)[:, None, None], -torch.inf).softmax(-1)
        wanted = torch.einsum("thgs,tshd->thgd", shares, value).reshape(len(owner), -1)
        worst = float((output - wanted).abs().max())
        if not worst < (1e-3 if like.dtype == torch.float32 else 5e-2):  # nan too
            raise RuntimeError(f"attention of {lines} queries at once is {worst:.3g} off")


def _as_bits(seen: Tensor) -> Tensor:
    """Return a mask [T, S] bool as the kernels read it, [T, S / 32] int32."""
    return torch.from_numpy(np.packbits(seen.numpy(), axis=-1).view(np.int32))
