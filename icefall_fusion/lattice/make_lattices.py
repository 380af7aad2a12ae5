"""Job ``make-lattices``: saved log-probs through k2 to files of lattices, which ``decode`` reads elsewhere.
Knows: saved log-probs, k2's lattices, files of them. Must not know: language models, references, methods.

k2 and the LLM need not be in one environment: log-probs go from one to the other (``decode
--save_emissions``), lattices come back (``decode --k2.saved``).
"""
from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import MutableMapping

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.saved import SavedSource
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import fingerprint, write_json
from icefall_fusion.lattice.saved import save_lattices
from icefall_fusion.lattice.source import K2Options, K2Source, open_lattices
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
        check_at_least(1, self, "batch_size")
        check(bool(self.k2.graph), "MakeLatticesOptions.k2.graph", "name a graph of the job make-graph", "")


def run(options: MakeLatticesOptions) -> int:
    """Run the job ``make-lattices``; a run that was killed goes on, and leaves files that are there.

    Raises:
        FileNotFoundError, ValueError, Unavailable: see `open_lattices`.
    """
    tokens = AcousticTokens.load(options.tokens)
    source = SavedSource(options.emissions, tokens, options.device)
    lattices = open_lattices(options.k2, tokens, options.device)
    assert isinstance(lattices, K2Source)
    _refuse_other_options(options)
    ids, counters = source.ids, {}
    for number, start in enumerate(range(0, len(ids), options.batch_size)):
        path = Path(options.out) / f"lattices-{number:05d}.npz"
        if not path.is_file():
            _write_batch(path, lattices, source.emit(ids[start : start + options.batch_size]), counters)
    if counters.get("lattice_frames"):
        counters["arcs_a_frame"] = round(counters["lattice_arcs"] / counters["lattice_frames"], 1)
    print(f"{options.out}: {len(ids)} utterances; {counters}")
    return 0


def _write_batch(
    path: Path, source: K2Source, emissions: Emissions, counters: MutableMapping[str, float]
) -> None:
    seconds, lists, begun = {}, {}, time.perf_counter()
    lattices = source.make(emissions, counters)
    seconds["lattices"] = time.perf_counter() - begun
    for kind in source.list_kinds:
        begun = time.perf_counter()
        lists[kind] = source.lists_of(lattices, emissions, kind, counters)
        seconds[kind] = time.perf_counter() - begun
    save_lattices(path, lattices.plain, lists, source.labels, emissions.tokens, seconds)
    logging.info("%s: %d utterances, %s", path, len(emissions),
                 {name: f"{value:.2f} s" for name, value in seconds.items()})


def _refuse_other_options(options: MakeLatticesOptions) -> None:
    """Write down the options that lattices depend on, or refuse a folder of lattices with other options."""
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
