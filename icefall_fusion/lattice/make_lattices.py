"""Job ``make-lattices``: saved log-probs through k2 to files of lattices, which ``decode`` reads elsewhere.
Knows: saved log-probs, k2's lattices, files of them. Must not know: language models, references, methods.

k2 and the LLM need not live in one environment: log-probs go from one to the other (``decode
--save_emissions``), lattices come back (``decode --k2.saved``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from icefall_fusion.acoustic.emissions import SavedSource
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import fingerprint, write_json
from icefall_fusion.lattice.files import write_folder
from icefall_fusion.lattice.source import K2Lattices, K2Options, open_lattices
from icefall_fusion.text.tokens import AcousticTokens


@dataclass(frozen=True)
class MakeLatticesOptions:
    """Make lattices, and N-best lists of their paths, from saved log-probs.

    Args:
        emissions: a .npz of log-probs or a folder of them (of decode --save_emissions).
        tokens: the acoustic model's bpe.model, or its folder.
        out: folder for lattices-*.npz.
        k2: graph, n-gram and how lattices are made.
        device: e.g. cpu or cuda.
        batch_size: utterances in a batch and file.
    """

    emissions: str
    tokens: str
    out: str
    k2: K2Options = field(default_factory=K2Options)
    device: str = "cpu"
    batch_size: int = 16

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "MakeLatticesOptions.batch_size", "be at least 1", self.batch_size)
        check(bool(self.k2.graph), "MakeLatticesOptions.k2.graph", "name a graph of the job make-graph", "")


def run(options: MakeLatticesOptions) -> int:
    """Run the job ``make-lattices``; a run that was killed goes on.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: see `open_lattices`.
    """
    tokens = AcousticTokens.load(options.tokens)
    source = SavedSource(options.emissions, tokens, options.device)
    lattices = open_lattices(options.k2, tokens, options.device)
    assert isinstance(lattices, K2Lattices)
    _refuse_other_options(options)
    ids = source.ids
    batches = [ids[start : start + options.batch_size] for start in range(0, len(ids), options.batch_size)]
    kinds = ("nbest", "whole") if lattices.has_ngram else ("nbest",)
    counters = write_folder(lattices, batches, source.emit, options.out, kinds)
    frames = counters["lattice_frames"]
    if frames:
        counters["arcs_a_frame"] = round(counters["lattice_arcs"] / frames, 1)
    print(f"{options.out}: {len(ids)} utterances; {counters}")
    return 0


def _refuse_other_options(options: MakeLatticesOptions) -> None:
    """Note what lattices are made by, or refuse to mix them with those made by something else."""
    made = dataclasses.asdict(options)
    for name in ("graph", "ngram"):
        made["k2"][name] = fingerprint(made["k2"][name]) if made["k2"][name] else ""
    for name in ("device", "out", "tokens"):
        del made[name]
    path = Path(options.out) / "options.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        rule = f"be a new folder, for the lattices in it were made with other options than {made}"
        check(before == json.loads(json.dumps(made)), "MakeLatticesOptions.out", rule, options.out)
    else:
        write_json(path, made)
        logging.info("lattices go to %s", options.out)
