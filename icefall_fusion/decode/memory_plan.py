"""What a decode will hold in memory, said before it starts: what is there, a try of the encoder, estimates.
Knows: loaded models, kinds of parts of methods, sizes of batches. Must not know: how anything is computed.

``peak = held + gathered + max over batches of (inputs and log-probs + max(encoder, parts of a method))``:
what the process (on a GPU: PyTorch there) holds when the models are loaded, and gathers later; the encoder's
tensors as measured for utterances of that length; for each LM keys and values, distributions and one forward,
by formulas.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

import torch

from icefall_fusion.common.devices import weight_bytes
from icefall_fusion.fusion.rescoring import TOKENS_A_CALL, UTTERANCES_A_CALL
from icefall_fusion.lm import CausalLm, TreeOptions
from icefall_fusion.lm.slots import FIRST_SLOTS

#: Fast English speech in an LLM's tokens (or in acoustic pieces), and what a beam adds to the best path.
TOKENS_A_SECOND, TOKENS_A_SLOT = 6.0, 12.0
#: An N-best list has so many tokens beside the best path, for each hypothesis and token of that.
_RESCORED = 0.5
_FLOAT = 4
_LOG_PROBS, _HIDDEN, _INNER = 3, 8, 3  # [n, V], [Q, hidden], [Q, inner] that live at once in a forward


@dataclass(frozen=True)
class BatchShape:
    """So many utterances (or parts) of at most so many seconds, decoded together."""

    rows: int
    seconds: float


class MethodShape(NamedTuple):
    """A method: slots of its search, hypotheses that its second passes get, kind and source of its parts."""

    beam: int
    nbest: int
    parts: Sequence[tuple[str, str]]  # see methods.Part


def plan_memory(
    acoustic: Optional[torch.nn.Module],
    lms: Mapping[str, CausalLm],
    batches: Iterable[BatchShape],
    methods: Mapping[str, MethodShape],
    encoder: Callable[[BatchShape], tuple[int, int]],
    held: int,
    ngram: int = 0,
    gathered: int = 0,
    prompts: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return bytes by part, and the free memory of each GPU that is used.

    Args:
        acoustic: the acoustic model; None: log-probs come from a file.
        lms: the language models by source, loaded.
        batches: that there will be.
        methods: that will decode them, by name.
        encoder: bytes that a batch takes while it is searched, and more while it is encoded.
        held: bytes in use now.
        ngram: bytes of the n-gram's tables.
        gathered: bytes that the process will hold beside all this.
        prompts: tokens of the longest prompt of each source.

    Returns:
        ``held``, ``gathered``; of the former ``acoustic_weights``, ``ngram`` and for each source ``weights``;
        for each source also ``kv_a_token``, and ``kv`` and ``forward`` of its largest batch; ``inputs`` and
        ``encoder``; ``total``, the peak; ``largest``, the batch and the method that make it; ``free`` by
        device.
    """
    plan: dict[str, Any] = {"held": held, "ngram": ngram, "gathered": gathered}
    plan["acoustic_weights"] = 0 if acoustic is None else weight_bytes(acoustic)
    for source, lm in lms.items():
        plan[source] = {"weights": weight_bytes(lm.model), "kv_a_token": lm.kv_bytes_a_token}
        plan[source].update(kv=0, forward=0)
    plan.update(inputs=0, encoder=0, total=held + gathered, largest="nothing")
    for batch in set(batches):
        kept, more = encoder(batch)
        plan["inputs"], plan["encoder"] = max(plan["inputs"], kept), max(plan["encoder"], more)
        needed = {"the encoder": more}
        for method, (beam, nbest, parts) in methods.items():
            needed[method] = 0
            for kind, source in parts:
                kv, forward = _attention(acoustic, batch, nbest) if source == "attention" else (0, 0)
                if source in lms:
                    kv, forward = _lm(lms[source], kind, batch, beam, nbest, prompts.get(source, 0))
                    plan[source]["kv"] = max(plan[source]["kv"], kv)
                    plan[source]["forward"] = max(plan[source]["forward"], forward)
                # second passes come one after the other, and the trees of the first are gone
                together = kv + forward + (needed[method] if kind != "rescoring" else 0)
                needed[method] = max(needed[method], together)
        method = max(needed, key=lambda name: needed[name])
        total = held + gathered + kept + needed[method]
        if total > plan["total"]:
            plan["total"] = total
            plan["largest"] = f"{method}, {batch.rows} of {batch.seconds:.0f} s"
    plan["free"] = {str(device): free_bytes(device) for device in _gpus(acoustic, lms)}
    return plan


def _lm(
    lm: CausalLm, kind: str, batch: BatchShape, beam: int, nbest: int, prompt: float
) -> tuple[int, int]:
    """Return bytes of keys and values, and of distributions and a forward.

    Keys and values: for each utterance one token tree with its best path and, for each slot of the beam, some
    tokens beside it; ``kv_bytes_peak`` in ``run.json`` is what it came to.
    """
    path, options = batch.seconds * TOKENS_A_SECOND, TreeOptions()
    rows, tokens = batch.rows, path + beam * TOKENS_A_SLOT
    most = options.tokens_a_call(lm.vocab_size)
    if kind == "rescoring":
        rows = max(1, min(rows, int(TOKENS_A_CALL / max(1.0, nbest * path))))
        tokens = path * (1 + _RESCORED * nbest)
        forwarded = wanted = min(most, int(rows * tokens))
        kept = 0
    else:
        wanted, kept = min(most, rows * beam), rows * beam
        forwarded = min(most, 2 * wanted)
    kv = rows * _slots(prompt + tokens) * lm.kv_bytes_a_token
    config = lm.model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # gathered for the utterances that take part; fused kernels read it where it lies
    layer = 0 if lm.fused is not None else kv // lm.layers
    forward = layer + forwarded * (_HIDDEN * config.hidden_size + _INNER * inner) * lm.model.dtype.itemsize
    distributions = min(kept * _FLOAT * lm.vocab_size, options.max_distribution_bytes)
    return kv, forward + distributions + wanted * _LOG_PROBS * _FLOAT * lm.vocab_size


def _attention(acoustic: Any, batch: BatchShape, nbest: int) -> tuple[int, int]:
    """Return 0 and the bytes of the attention decoder's forward over the N-best lists of some utterances."""
    options = getattr(acoustic, "options", None)
    if options is None:
        return 0, 0
    places = min(batch.rows, UTTERANCES_A_CALL) * nbest * int(batch.seconds * TOKENS_A_SECOND)
    inner = options.decoder.feedforward + _HIDDEN * options.encoder.size
    return 0, places * _FLOAT * (_LOG_PROBS * options.vocab_size + inner)


def _slots(tokens: float) -> int:
    """Return the slots of an utterance's buffer that holds so many tokens: it grows by doubling."""
    return FIRST_SLOTS * 2 ** max(0, math.ceil(math.log2(max(1.0, tokens) / FIRST_SLOTS)))


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
                f"({part['kv_a_token'] / 1e3:,.1f} kB a token) + a forward {megabytes(part['forward'])}"
            )
    parts.append(f"inputs and log-probs {megabytes(plan['inputs'])}, encoder {megabytes(plan['encoder'])}")
    if plan["gathered"]:
        parts.append(f"libraries and allocator {megabytes(plan['gathered'])}")
    free = ", ".join(f"{device} has {megabytes(count)} left" for device, count in plan["free"].items())
    return (f"{'; '.join(parts)}; {megabytes(plan['held'])} are held now, the peak is about "
            f"{megabytes(plan['total'])} ({plan['largest']}){'; ' + free if free else ''}")  # fmt: skip


def _gpus(acoustic: Optional[torch.nn.Module], lms: Mapping[str, CausalLm]) -> list[torch.device]:
    models = [lm.model for lm in lms.values()] + ([] if acoustic is None else [acoustic])
    devices = {parameter.device for model in models for parameter in model.parameters()}
    return sorted((device for device in devices if device.type == "cuda"), key=str)
