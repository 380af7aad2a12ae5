"""Registers and spills of the GPU search kernel by form and warps, compiled for a GPU that need not be here.
Knows: forms of searches, Triton's compiler. Must not know: how the kernel works, times.

    python tools/bench/kernel_registers.py                                  # beams 10 and 50, warps 1 to 8
    python tools/bench/kernel_registers.py --forms ahead --beams 10 20 --warps 1 4

Each row is one kernel by NVIDIA's assembler: registers a thread, bytes of local memory that a thread spills,
instructions (of all loops and branches once). "cycles" is an estimate of one frame for one warp: the largest
loop once from top to bottom, each instruction when its operands are there, by `LATENCY`; what warps wait for
one another is not in it. The search takes the warps with a star. It has never been held to times on a GPU.
"""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import figures  # noqa: E402

from icefall_fusion.ngram.phrases import PhraseAutomaton  # noqa: E402
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402
from icefall_fusion.search.beam import Beam  # noqa: E402
from icefall_fusion.search.engines import gpu  # noqa: E402
from icefall_fusion.search.engines.base import plan_frames  # noqa: E402
from icefall_fusion.search.fusion import AheadTerms, Fusion, FusionSet, StopRule  # noqa: E402
from icefall_fusion.search.search_input import check_input  # noqa: E402

#: What takes part: the rule of a delayed fusion or None, and what an n-gram and phrases do.
FORMS = {
    "alone": (None, ""),
    "interval": (StopRule(16), ""),
    "words": (StopRule(1, "words"), ""),
    "pieces": (StopRule(1, "pieces"), ""),
    "ahead": (StopRule(1, "words"), "ahead"),
    "late+ahead": (StopRule(1, "words", late=4), "ahead"),
    "ngram": (None, "shallow"),
    "ngram+interval": (StopRule(16), "shallow"),
    "phrases": (None, "phrases"),
    "phrases+words": (StopRule(1, "words"), "phrases"),
    "phrases+ahead": (StopRule(1, "words"), "ahead phrases"),
    "phrases+ngram": (StopRule(1, "words"), "shallow phrases"),
}


#: Cycles until a result is there, by the first part of an instruction's name; others: 4. Round numbers for
#: Hopper; memory after Luo et al., "Benchmarking and dissecting the Nvidia Hopper GPU architecture via
#: microbenchmarking" (arXiv 2402.13499), loads as if all came from the second cache.
LATENCY = {"LDG": 263, "LDS": 29, "LDL": 35, "LDC": 29, "ULDC": 29, "SHFL": 23, "BAR": 20, "MUFU": 20,
           "REDUX": 23, "DADD": 16, "IMAD": 5, "S2R": 20, "ATOMS": 40}


class Target(NamedTuple):
    """A GPU that need not be here, as Triton's drivers describe themselves."""

    capability: int

    def get_current_target(self) -> Any:
        """Return architecture and warp size."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return a number that tells targets apart."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Return the stream, of which there is none."""
        return 0


class Scores(Fusion):
    """A fusion that is only there so that the kernel has its form."""

    word_bonus = 0.5

    def __init__(self, weight: float, rule: StopRule, ngram: Optional[PieceNgram] = None) -> None:
        self.weight, self.rule, self.piece_ngram = weight, rule, ngram
        self.source, self.scores_extensions = ("llm", False) if ngram is None else ("ngram", True)

    def stop_rule(self) -> StopRule:
        """Return the rule."""
        return self.rule


class Boosts(Fusion):
    """Some phrases."""

    source, weight, word_bonus, scores_extensions = "hotwords", 1.0, 0.5, True

    def __init__(self, pieces: int, utterances: int) -> None:
        automaton = PhraseAutomaton(pieces, [((1, 2), 1.0), ((2, 3), 1.0)])
        self.phrases, self.phrase_bases = [automaton] * utterances, {automaton: 0}

    def stop_rule(self) -> StopRule:
        """Return that no utterance has to stop."""
        return StopRule(0)


def some_ngram(pieces: int, order: int) -> PieceNgram:
    """Return an n-gram that has few n-grams beside the unigrams."""
    base = pieces + 2
    orders = [
        NgramOrder(n, torch.arange(base) * base ** (n - 1), torch.zeros(base), torch.zeros(base))
        for n in range(1, order + 1)
    ]
    return PieceNgram(pieces, orders, "some")


def compile_form(form: str, beam: int, warps: Optional[int] = None, pieces: int = 500, order: int = 5,
                 batch: int = 2, capability: int = 90) -> tuple[Any, int, int]:
    """Return the compiled kernel of a search, its warps and those that the search itself would take.

    Args:
        form: of `FORMS`; beam: K; warps: None: those that the search takes.
        pieces: V; order: of the n-gram; batch: B.
        capability: of the GPU, times 10.
    """
    import triton

    triton.runtime.driver.set_active(Target(capability))
    rule, role = FORMS[form]
    ngram = some_ngram(pieces, order) if {"ahead", "shallow"} & set(role.split()) else None
    fusions: list[Fusion] = []
    if rule is not None:
        ahead = AheadTerms(ngram, 0.3, 0.5, 1) if "ahead" in role else None
        fusions.append(Scores(0.5, rule._replace(ahead=ahead)))
    if "shallow" in role:
        fusions.append(Scores(0.3, StopRule(0), ngram))
    if "phrases" in role:
        fusions.append(Boosts(pieces, batch))
    frames = 20
    log_probs = torch.randn(batch, frames, pieces).log_softmax(-1)
    inputs = check_input(log_probs, torch.full((batch,), frames), 0, None, None)
    starts_word = torch.ones(pieces, dtype=torch.bool)
    words = type("Words", (), {"starts_word": starts_word.tolist()})
    together = FusionSet(fusions, words)  # type: ignore[arg-type]
    root = Beam.at_root(inputs, beam, starts_word if fusions else None, len(fusions))
    together.begin(root, inputs.ids)
    plan = plan_frames(inputs, None, leave_out=False)
    search = gpu.GpuSearch(inputs, plan, root, PrefixSearchOptions(beam), together)
    used = warps or search.warps
    run = search.kernel.search_utterances.warmup
    return run(*search.arguments(frames), grid=(batch,), form=search.form, num_warps=used), used, search.warps


def usage(kernel: Any, capability: int = 90) -> dict[str, int]:
    """Return the registers, spilled bytes (stored, loaded), instructions and cycles of a kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.asm["ptx"])
        binary.write_bytes(kernel.asm["cubin"])
        suffix = "a" if capability >= 90 else ""
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{capability}{suffix}", str(source), "-o",
                   str(Path(folder, "again.cubin"))]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(binary)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {"registers": r"Used (\d+) registers", "stored": r"(\d+) bytes spill stores",
             "loaded": r"(\d+) bytes spill loads"}
    row = {name: int(match.group(1)) for name, rule in found.items() if (match := re.search(rule, told))}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);", code, re.MULTILINE)
    program = [(int(at, 16), line) for at, line in lines]
    return {**row, "instructions": len(program), "cycles": cycles(program)}


def cycles(program: Sequence[tuple[int, str]]) -> int:
    """Return the cycles of one warp from top to bottom of a program's largest loop, a scoreboard in order.

    Args:
        program: addresses and instructions, as cuobjdump prints them.
    """
    jumps = [(at, int(line.split("0x")[-1], 16)) for at, line in program if re.search(r"\bBRA\b.*0x", line)]
    begin, end = max(((to, at) for at, to in jumps if to < at), key=lambda span: span[1] - span[0],
                     default=(0, program[-1][0]))
    ready: dict[str, int] = {}
    now = 0
    for _, line in (entry for entry in program if begin <= entry[0] <= end):
        name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        named = [re.findall(r"\bU?[RP]\d+\b", operand) for operand in operands]
        written = 0 if name.startswith(("ST", "BRA", "BAR", "EXIT", "RED.")) else 1
        while 0 < written < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[written - 1]):
            written += 1  # a predicate comes before the register, or alone
        if "SETP" in name:
            written = 2
        read = [one for names in named[written:] for one in names] + re.findall(r"^@!?(U?P\d)", line)
        now = max([now + 1, *(ready.get(one, 0) for one in read)])
        wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        latency = LATENCY.get(name.split(".")[0], 4)
        for one in (one for names in named[:written] for one in names):
            kind, number = one.rstrip("0123456789"), int(re.findall(r"\d+$", one)[0])
            for step in range(wide if kind.endswith("R") else 1):
                ready[f"{kind}{number + step}"] = now + latency
        now += latency if name.startswith("BAR") else 0
    return now


def main() -> None:
    """Parse the command line, compile, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--warps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pieces", type=int, default=500)
    parser.add_argument("--order", type=int, default=5, help="of the n-gram")
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 90: H100 and H200")
    parser.add_argument("--output", default="bench/kernel-registers.json")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # it is to be compiled
    args.device = "cpu"
    rows = []
    names = ("registers", "stored", "loaded", "instructions", "cycles")
    print(f"{'form':16}{'beam':>5}{'warps':>7}" + "".join(f"{name:>14}" for name in names))
    for form in args.forms:
        for beam in args.beams:
            for warps in args.warps:
                kernel, _, own = compile_form(form, beam, warps, args.pieces, args.order, 2, args.capability)
                row = {"form": form, "beam": beam, "warps": warps, "own": own}
                row.update(usage(kernel, args.capability))
                rows.append(row)
                figures.save(args, rows)
                star = "*" if warps == own else " "
                print(f"{form:16}{beam:>5}{warps:>6}{star}" + "".join(f"{row[name]:>14}" for name in names),
                      flush=True)
    figures.write(args, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
