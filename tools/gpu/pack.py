"""Makes what travels to a bare machine with a GPU and no network, and checks that it is whole and small.
Knows: the folder .gpu, wheels, the demo's speech, sizes. Must not know: what the steps of a day measure.

    bash tools/gpu_pack.sh                       # make what is missing or old, then --check
    bash tools/gpu_pack.sh --books FILE.tar.xz   # with the books to train on, for call 2
    bash tools/gpu_pack.sh --check               # sizes, wheels and the exact calls; no network
    bash tools/gpu_pack.sh --lean                # large weights leave git's index until --undo
    bash tools/gpu_pack.sh --undo

To the machine goes the checkout (tracked files, and those that git does not ignore) with the ignored paths
that a call names: 64 MiB at most. From it come 8 files of 16 MiB at most. --lean must come before a call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tools" / "bench")]

import lean  # noqa: E402
from steps import EVENTS, SHIPPED_METHODS, STREAMS  # noqa: E402
from wheels import make_wheels, unserved  # noqa: E402

MOST = 60 * 2**20  # bytes of one call; 64 MiB are allowed
LONGEST_COMMAND, MOST_CARRIED = 2000, 8
MODELS = "egs/minibooks/ASR/pretrained"
#: Weights that leave the index before a call; a call that needs one carries it.
LEFT_OUT = tuple(
    f"{MODELS}/{name}"
    for name in (
        "ctc_aed/model.safetensors",
        "llm/adapter_model.safetensors",
        "matched_llm/adapter_model.safetensors",
        "nlm/model.safetensors",
        "ngram.arpa.gz",
    )
)
#: Ignored paths of each call; those of .gpu need not be there.
CARRIED = {
    1: (".gpu/pack.json", ".gpu/wheels", ".gpu/speech", ".gpu/streams", f"{MODELS}/ctc_aed/model.safetensors",
        f"{MODELS}/ngram.arpa.gz"),
    2: (".gpu/pack.json", ".gpu/wheels", ".gpu/call2"),
}
TIMEOUTS = {1: 480, 2: 330}
COMMANDS = {
    1: 'bash tools/gpu_day.sh --call 1 --out "$OUT"',
    2: 'bash tools/gpu_day.sh --call 2 --out "$OUT" --budget 290',
}
SENTENCES, SENTENCES_OF_STREAMS = 64, 16
NEEDED = ("speech/cuts.jsonl.gz", STREAMS[0], "speech/llm/config.json", "pack.json")


# --- speech -------------------------------------------------------------------------------------------


def make_speech(out: Path) -> None:
    """Make log-probs of the demo's sentences by the shipped model, the LLM's events, and a CPU's rows.

    With these no speech of theirs travels. The LLM is too large: its events and its tokens travel, with a few
    random weights. The rows of a CPU stay here, to compare with.
    """
    import numpy as np
    import shapes

    folder, work = out / "speech", out / "work"
    weights = [file for name in ("ctc_aed", "llm") for file in (ROOT / MODELS / name).glob("*.safetensors")]
    made_of = digest([*sorted(weights), ROOT / "tools/demo/stories.txt"])
    stamp = out / "speech.made-of"
    whole = stamp.is_file() and (folder / "llm" / "config.json").is_file()
    if not (whole and stamp.read_text() == made_of):
        bench("speech", "--keep", folder, "--speech", work / "speech", "--sentences", SENTENCES)
        for path in folder.glob("*.npz"):  # a third smaller
            with np.load(path) as archive:
                np.savez_compressed(path, **{name: archive[name] for name in archive.files})
        given = ("--emissions", folder, "--speech", work / "events")
        for batch, (file, _) in EVENTS.items():
            bench("llm_tree", *given, "--batch", batch, "--record", out / file)
        shapes.save_stand_in(folder / "llm")
        methods = SHIPPED_METHODS.split()
        given += ("--llm", folder / "llm")
        bench("fusion", *given, "--methods", *methods, "--output", out / "cpu-fusion.json")
        shutil.rmtree(work, ignore_errors=True)
        stamp.write_text(made_of)


def make_streams(out: Path) -> None:
    """Speak sentences that are streams there: audio, and when each word sounds."""
    from lhotse import CutSet, load_manifest
    from word_times import parser_of, speech

    folder = out / "streams"
    if (out / STREAMS[0]).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    args = parser_of(None, "streams", "").parse_args(
        ["--speech", str(folder), "--sentences", str(SENTENCES_OF_STREAMS // 2)])
    cuts = [cut for split in ("test-clean", "test-other") for cut in load_manifest(speech(args, split))]
    for cut in cuts:
        [source] = cut.recording.sources
        source.source = os.path.relpath(source.source, ROOT)  # where steps run
    CutSet.from_cuts(cuts).to_file(out / STREAMS[0])


def bench(program: str, *options: object) -> None:
    """Run a benchmark here, on the CPU.

    Raises:
        RuntimeError: it fails; with the end of what it says.
    """
    command = [sys.executable, f"tools/bench/{program}.py", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {(done.stdout + done.stderr)[-2000:]}")


def digest(paths: Sequence[Path]) -> str:
    """Return a hash of files."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()


# --- all ----------------------------------------------------------------------------------------------


def make(out: Path, books: str) -> None:
    """Make everything that is missing or old."""
    make_wheels(out)
    make_speech(out)
    make_streams(out)
    if books:
        text = out / "call2" / "text"
        shutil.rmtree(text, ignore_errors=True)
        text.mkdir(parents=True)
        shutil.copy(books, text)
    commit = lean.git(ROOT, "describe", "--always", "--dirty", "--abbrev=12").strip()
    (out / "pack.json").write_text(json.dumps({"commit": commit}), encoding="utf-8")


def size(path: Path) -> int:
    """Return the bytes of a file or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def parts(call: int, out: Path) -> dict[str, int]:
    """Return the bytes of all that a call sends: the checkout without LEFT_OUT, and each carried path."""
    checkout = [name for name in lean.tracked(ROOT) if name not in LEFT_OUT]
    found = {"checkout": sum((ROOT / name).stat().st_size for name in checkout)}
    for name in CARRIED[call]:
        path = out / name[len(".gpu/") :] if name.startswith(".gpu/") else ROOT / name
        if path.exists():
            found[name] = size(path)
    return found


def check(out: Path) -> list[str]:
    """Print sizes and calls; return what is wrong."""
    bad = unserved(out)
    bad += [
        f"{path} is missing" for path in NEEDED if not (out / path).is_file()
    ]
    for call, command in COMMANDS.items():
        sizes = parts(call, out)
        total = sum(sizes.values())
        print(f"call {call}: {total / 2**20:.1f} MiB of {MOST / 2**20:.0f}")
        for name, count in sizes.items():
            print(f"  {count / 2**20:8.2f} MiB  {name}")
        if total > MOST:
            bad.append(f"call {call} sends {total / 2**20:.1f} MiB")
        carried = [name for name in sizes if name != "checkout"]
        if len(command) > LONGEST_COMMAND or len(carried) > MOST_CARRIED:
            bad.append(
                f"call {call} has a command of {len(command)} characters and carries {len(carried)} paths"
            )
        print(f"  command: {command}\n  carry: {json.dumps(carried)}\n  timeout: {TIMEOUTS[call]} s")
    if not (out / "call2" / "text").is_dir():
        print("there is no text for call 2 (--books): it would train on the demo's stories")
    leant = set(LEFT_OUT) - set(lean.git(ROOT, "ls-files", "--", *LEFT_OUT).split("\n"))
    print(
        "the large weights are "
        + ("left out: --undo brings them back" if leant else "in git's index: --lean first")
    )
    return bad


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Make, check, lean or undo; return 0, or 1 if something is wrong."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    what = parser.add_mutually_exclusive_group()
    for name in ("check", "lean", "undo"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", default=str(ROOT / ".gpu"))
    parser.add_argument(
        "--books", default="", help="archive of books, one text each; none: no text for call 2"
    )
    args = parser.parse_args(arguments)
    out = Path(args.out)
    try:
        if args.lean:
            lean.leave_out(ROOT, LEFT_OUT)
        if args.undo:
            lean.undo(ROOT, LEFT_OUT)
        if not (args.check or args.lean or args.undo):
            make(out, args.books)
        bad: list[Any] = [] if args.undo else check(out)
    except RuntimeError as error:
        bad = [error]
    for line in bad:
        print(f"gpu_pack.sh: {line}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
