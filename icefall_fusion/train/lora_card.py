"""The page (README.md) of an adapter: its base, its options, its learning curve.
Knows: options of adapters, lines of a training log. Must not know: models, the training loop.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icefall_fusion.common.files import PathLike
from icefall_fusion.train.lora import LoraOptions
from icefall_fusion.train.training_log import read_validations


def card(base: Mapping[str, Any], lora: LoraOptions, more: Mapping[str, Any], log: PathLike) -> str:
    """Return the page of an adapter: base, hash, options, tokens seen, learning curve.

    Args:
        base: of `Base.identity`.
        lora: of the adapter.
        more: further facts, by name.
        log: ``log.jsonl`` of the training.
    """
    curve = "\n".join(
        f"| {line['step']} | {line['items']} | {line['valid_word_perplexity']:.1f} |"
        for line in read_validations(log) if "valid_word_perplexity" in line
    )
    facts = {"base": base["name"], "SHA-256 of the base": base["sha256"] or "not known",
             "starts with": f"`{base['bos']}`", "ends with": f"`{base['eos']}`",
             "rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout,
             "layers": ", ".join(lora.targets), **more}
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        "---\nlibrary_name: peft\n"
        f"base_model: {base['name']}\n---\n"
        "# A LoRA adapter, trained by icefall_fusion's job train-lm\n\n"
        f"| what | value |\n|---|---|\n{table}\n\n"
        "Perplexity a word on dev, the end of each sentence counted as one more word:\n\n"
        f"| step | tokens seen | perplexity a word |\n|---|---|---|\n{curve}\n"
    )
