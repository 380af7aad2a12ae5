"""Speech for benchmarks that need some: the sentences of the demo, spoken once and kept; the shipped models.
Knows: the demo, decoding options. Must not know: what is measured.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.decode.demo import SETS, DemoOptions, read_sentences, speak
from icefall_fusion.decode.job import DecodeOptions
from icefall_fusion.decode.pretrained import with_pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which speech and which models."""
    parser.add_argument("--cuts", default="", help="manifest with features; none: sentences of the demo")
    parser.add_argument("--sentences", type=int, default=64, help="of the demo, half clean and half noisy")
    parser.add_argument("--speech", default="bench/speech", help="folder for the demo's audio")
    parser.add_argument("--emissions-model", default="", help="acoustic model; none: the shipped one")
    parser.add_argument("--llm", default="", help="model folder or hub name; none: the shipped LLM")
    parser.add_argument("--device", default="cpu")


def manifests(args: argparse.Namespace) -> dict[str, str]:
    """Return manifests by name; speaks the sentences unless that is done."""
    if args.cuts:
        return {Path(args.cuts).name.split(".")[0]: args.cuts}
    options = DemoOptions(out=args.speech)
    every = read_sentences(options.stories)
    step = max(2, len(every) // max(1, args.sentences) // 2 * 2 + 1)  # odd: both sets get their share
    sentences = every[::step][: args.sentences]
    data = Path(args.speech) / f"{len(sentences)}"
    return {name: speak(options, data, name, sentences) for name in SETS}


def decode_options(args: argparse.Namespace, out: str, sets: dict[str, str], **more: Any) -> DecodeOptions:
    """Return options of a decode with the shipped models, or with those that ``args`` names."""
    emissions = EmissionOptions(device=args.device)
    options = DecodeOptions(out=out, test_sets=sets, emissions=emissions, restart=True, **more)
    options = with_pretrained(options)
    if args.emissions_model:
        options = replace(options, emissions=replace(options.emissions, model=args.emissions_model))
    if args.llm:
        options = replace(options, llm=replace(options.llm, path=args.llm))
    return options
