"""What a decode will hold in memory, said before it starts: weights as they are, caches as estimated.
Knows: loaded models, options of a decode. Must not know: how anything is computed.
"""
from __future__ import annotations

import math
from typing import Any, Mapping, Optional, Sequence

import torch

from icefall_fusion.devices import weight_bytes
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.slots import FIRST_SLOTS
from icefall_fusion.lm.tree_scorer import TreeOptions

#: Fast English speech in an LLM's tokens (or in acoustic pieces), and what a beam adds to the best path.
TOKENS_A_SECOND, TOKENS_A_SLOT = 6.0, 12.0


def plan_memory(
    acoustic: Optional[torch.nn.Module],
    lms: Mapping[str, CausalLm],
    batches: Sequence[tuple[int, float]],
    beam: int,
    ngram: int = 0,
) -> dict[str, Any]:
    """Return bytes by part, and the free memory of each GPU that is used.

    Keys and values are estimated: for each utterance one token tree that holds its best path and, for each
    slot of the beam, some tokens beside it. ``kv_bytes_peak`` in ``run.json`` is what it came to.

    Args:
        acoustic: the acoustic model; None: log-probs come from a file.
        lms: the language models by source.
        batches: the largest that there may be: numbers of utterances, and seconds of each.
        beam: slots.
        ngram: bytes of the n-gram's tables.

    Returns:
        ``acoustic_weights``, ``ngram``; for each source ``{weights, kv_a_token, kv, distributions}``;
        ``total``; ``free`` by device.
    """
    plan: dict[str, Any] = {"acoustic_weights": 0 if acoustic is None else weight_bytes(acoustic)}
    plan["ngram"] = ngram
    tokens = max(rows * _slots(seconds * TOKENS_A_SECOND + beam * TOKENS_A_SLOT) for rows, seconds in batches)
    slots = beam * max(rows for rows, _ in batches)
    total, most = plan["acoustic_weights"] + ngram, 0
    for source, lm in lms.items():
        rows = slots * 4 * lm.vocab_size  # a distribution for each slot, float32
        part = {
            "weights": weight_bytes(lm.model),
            "kv_a_token": lm.kv_bytes_a_token,
            "kv": tokens * lm.kv_bytes_a_token,
            "distributions": min(rows, TreeOptions().max_distribution_bytes),
        }
        plan[source] = part
        total += part["weights"]
        most = max(most, part["kv"] + part["distributions"])  # of one method at a time
    plan["total"] = total + most
    plan["free"] = {str(device): free_bytes(device) for device in _gpus(acoustic, lms)}
    return plan


def _slots(tokens: float) -> int:
    """Return the slots of an utterance's buffer that holds so many tokens: it grows by doubling."""
    return FIRST_SLOTS * 2 ** max(0, math.ceil(math.log2(tokens / FIRST_SLOTS)))


def free_bytes(device: torch.device) -> int:
    """Return what a GPU can still give: unused, or kept by PyTorch for reuse."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Return a plan as one line of text."""
    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.0f} MB"

    parts = [f"acoustic model {megabytes(plan['acoustic_weights'])}"]
    if plan["ngram"]:
        parts.append(f"n-gram {megabytes(plan['ngram'])}")
    for source, part in plan.items():
        if isinstance(part, dict) and "weights" in part:
            parts.append(
                f"{source} {megabytes(part['weights'])} + keys and values about {megabytes(part['kv'])} "
                f"({part['kv_a_token'] / 1e3:,.1f} kB a token) + {megabytes(part['distributions'])}"
            )
    free = ", ".join(f"{device} has {megabytes(count)} left" for device, count in plan["free"].items())
    return f"memory: {'; '.join(parts)}; in all about {megabytes(plan['total'])}{'; ' + free if free else ''}"


def _gpus(acoustic: Optional[torch.nn.Module], lms: Mapping[str, CausalLm]) -> list[torch.device]:
    models = [lm.model for lm in lms.values()] + ([] if acoustic is None else [acoustic])
    devices = {parameter.device for model in models for parameter in model.parameters()}
    return sorted((device for device in devices if device.type == "cuda"), key=str)
