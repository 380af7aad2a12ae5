"""Speech for benchmarks that need some: the sentences of the demo, spoken once and kept; the shipped models.
Knows: the demo, decoding options, saved log-probs. Must not know: what is measured.

    python tools/bench/speech.py --keep bench/saved     # log-probs, vocabulary and cuts of the sentences

`--emissions bench/saved` then serves any benchmark where there is no eSpeak NG and no acoustic model.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.files import opener
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.demo import SETS, DemoOptions, read_sentences, speak
from icefall_fusion.decode.job import DecodeOptions, DecodeRun
from icefall_fusion.decode.pretrained import with_pretrained, with_shipped_lms

_CUTS = "cuts.jsonl.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which speech and which models."""
    parser.add_argument("--cuts", default="", help="manifest with features; none: sentences of the demo")
    parser.add_argument("--sentences", type=int, default=64, help="of the demo, half clean and half noisy")
    parser.add_argument("--speech", default="bench/speech", help="folder for the demo's audio")
    parser.add_argument("--emissions", "--emissions-model", default="", dest="emissions_model",
                        help="acoustic model or saved log-probs (also of --keep); none: the shipped model")
    parser.add_argument("--llm", default="", help="model folder or hub name; none: the shipped LLM")
    parser.add_argument("--device", default="cpu")


def manifests(args: argparse.Namespace) -> dict[str, str]:
    """Return manifests by name; speaks the sentences unless that is done."""
    saved = Path(args.emissions_model) / _CUTS
    if args.cuts or (args.emissions_model and saved.is_file()):
        cuts = args.cuts or str(saved)
        return {Path(cuts).name.split(".")[0]: cuts}
    options = DemoOptions(out=args.speech)
    sentences = spread(read_sentences(options.stories), args.sentences)
    data = Path(args.speech) / f"{len(sentences)}"
    return {name: speak(options, data, name, sentences) for name in SETS}


def decode_options(args: argparse.Namespace, out: str, sets: dict[str, str], **more: Any) -> DecodeOptions:
    """Return options of a decode with the shipped models, or with those that ``args`` names."""
    emissions = EmissionOptions(model=args.emissions_model, device=args.device)
    options = DecodeOptions(out=out, test_sets=sets, emissions=emissions, restart=True, **more)
    options = with_shipped_lms(options) if args.emissions_model else with_pretrained(options)
    if args.llm:
        options = replace(options, llm=replace(options.llm, path=args.llm))
    return options


def keep(args: argparse.Namespace) -> Path:
    """Save log-probs, vocabulary and cuts of the speech in ``args.keep``, which other runs can name."""
    sets, folder = manifests(args), Path(args.keep)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with opener(folder / _CUTS)(folder / _CUTS, "wt", encoding="utf-8") as whole:
        for manifest in sets.values():
            with opener(manifest)(manifest, "rt", encoding="utf-8") as part:
                whole.writelines(part)
    options = decode_options(
        args, f"{args.speech}/keep", {folder.name: str(folder / _CUTS)}, methods="ctc-greedy",
        save_emissions=str(folder.parent),
    )
    DecodeRun(options).decode_all()
    return folder


def arguments(given: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_arguments(parser)
    parser.add_argument("--keep", required=True, help="folder to make; one that is there is made anew")
    return parser.parse_args(given)


def main() -> None:
    """Keep the log-probs."""
    folder = keep(arguments())
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"{folder}: log-probs, vocabulary and cuts, {size:.1f} MiB")


if __name__ == "__main__":
    main()
