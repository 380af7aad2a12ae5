"""The steps of a day on a GPU: what each runs, in which order, and how long it may take.
Knows: the programs and their options. Must not know: processes, clocks, files of results.

A step is a command, what follows it on a CPU (a rehearsal with tiny sizes), and what follows it when it is
repeated after a CUDA error (as small as can be). None of this has run on a GPU yet; limits are estimates.
"""
from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Optional, Sequence

#: Options that follow where a file of the payload is: the file, the options.
SPEECH = ("speech/cuts.jsonl.gz", "--emissions {payload}/speech --llm {payload}/speech/llm")
STREAMS = ("streams/cuts.jsonl.gz", "--cuts {payload}/streams/cuts.jsonl.gz --llm {payload}/speech/llm")
EVENTS = {size: (f"speech/events-{size}.json.gz", f"--events {{payload}}/speech/events-{size}.json.gz")
          for size in (32, 64)}
#: What is decoded by a stand-in of the shipped LLM, which is too large to travel; a CPU's rows of the same
#: are made with the payload.
SHIPPED_METHODS = "llm-delayed-interval-16 llm-delayed-shortest-ahead llm-nbest-rescoring"
#: Decoders of search.py that take long on a CPU.
SLOW = ("torchaudio", "flashlight log_add", "flashlight log_add, 40", "flashlight max", "pyctcdecode",
        "fast-ctc-decode", "k2, best path", "ours, mass recovered")
_FEW = "--limit 2 --batches 2"


@dataclass(frozen=True)
class Step:
    """One program of a day.

    Args:
        name: of the step, for --only and the results.
        limit: seconds that it may take.
        command: the program and its options, as in a shell. ``{device}``, ``{payload}``, ``{result}`` (a JSON
            file), ``{out}`` (the folder that comes back) and ``{minutes}`` (that are left) are filled in.
        cpu: options that follow in a rehearsal on a CPU; None: there is nothing to run there.
        small: options that follow when the step is repeated after a CUDA error; None: it is not.
        call: 1 or 2; 0: not on the day, only by --only.
        given: a file of the payload and the options that follow where it is.
        trusts: whether kernels that failed in the first step are switched off for it.
    """

    name: str
    limit: int
    command: str
    cpu: Optional[str] = ""
    small: Optional[str] = None
    call: int = 1
    given: Optional[tuple[str, str]] = None
    trusts: bool = True

    def words(self, cpu: bool = False) -> list[str]:
        """Return the words of the command."""
        return shlex.split(self.command) + (shlex.split(self.cpu or "") if cpu else [])


def _bench(name: str, limit: int, what: str, **more: object) -> Step:
    program, _, options = what.partition(" ")
    command = f"tools/bench/{program}.py --device {{device}} {options} --output {{result}}"
    return Step(name, limit, command, **more)  # type: ignore[arg-type]


def _frames(name: str, limit: int, options: str, **more: object) -> Step:
    cpu = "--batches 2 --beams 4 --frames 40 --rounds 1 --engines native torch"
    return _bench(name, limit, f"frame_loop {options}", cpu=cpu, small="--batches 2 --rounds 1", **more)


def _fusion(name: str, limit: int, options: str, **more: object) -> Step:
    cpu = f"{_FEW} --shape '' --dtype '' --methods llm-nbest-rescoring llm-delayed-interval-16"
    return _bench(name, limit, f"fusion {options}", cpu=cpu, small=_FEW, given=SPEECH, **more)


def _tree(name: str, limit: int, options: str, batch: int = 32, **more: object) -> Step:
    cpu = "--dtype float32 --models tiny --first 2"
    call = f"llm_tree --dtype bfloat16 {options}"
    return _bench(name, limit, call, cpu=cpu, small="--first 2", given=EVENTS[batch], **more)


def _training(name: str, limit: int, options: str, **more: object) -> Step:
    recipe = f"--recipe egs/minibooks/ASR/conf/ctc_aed_gpu.yaml --batches [600,1200] {options}"
    tiny = "egs/minibooks/ASR/conf/tiny/ctc_aed_gpu.yaml"
    cpu = f"--recipe {tiny} --batches [4] --utterance 2 --steps 2 --warmup 1"
    return _bench(name, limit, f"training {recipe}", cpu=cpu, small="--batches [60] --steps 2", **more)


_7B = "--dtype bfloat16 --shape mistral-7b"

STEPS = (
    Step("smoke", 95, "tools/gpu/smoke.py --device {device} --output {result}", cpu="--limit 120",
         trusts=False),
    _frames("frame_loop", 30, "--batches 128 --beams 10 --engines triton torchaudio"),
    _bench("search", 45,
           f"search --batch 128 --beams 10 --rounds 3 --budget 3 --leave-out {shlex.join(SLOW)}",
           cpu="--batch 2 --frames 40 --rounds 1", small="--batch 2 --rounds 1"),
    _tree("llm_tree", 75, "--models mistral-7b --ways 'lazy tree' 'lazy, cublas' 'lazy, launches' "
          "'lazy, unfused'"),
    _bench("profile", 50, f"profile_fusion {_7B} --groups 1 2", cpu="--batches 2 --shape '' --dtype ''",
           small="--batches 2", given=SPEECH),
    _fusion("fusion-7b", 110, f"{_7B} --methods llm-shallow llm-nbest-rescoring llm-delayed-shortest "
            "llm-delayed-interval-16 llm-delayed-interval-16-ahead llm-delayed-interval-16-late-8 "
            "--groups 0 1"),
    _fusion("fusion-shipped", 40, f"--methods {SHIPPED_METHODS}"),
    Step("tests", 90, "tools/gpu/gpu_tests.py --device {device} --output {result}",
         cpu="--files tests/ngram/test_ngram.py", trusts=False),
    _fusion("fusion-7b-64", 60, f"{_7B} --batches 64 --groups 0 1 --methods llm-nbest-rescoring "
            "llm-delayed-shortest llm-delayed-interval-16 llm-delayed-interval-16-ahead"),
    _bench("memory", 75, "memory --dtype bfloat16 --shapes mistral-7b --batch 8",
           cpu="--dtype '' --shapes tiny --batch 2 --seconds 3 --methods llm-delayed-interval-16",
           small="--batch 2 --seconds 5", given=SPEECH),
    _bench("streaming", 90, f"streaming {_7B} --methods ctc-prefix llm-delayed-shortest "
           "--kinds stream capacity --chunks 640 --capacity 6 --most-streams 256",
           cpu="--shape '' --dtype float32 --sentences 4 --capacity 1 --most-streams 2",
           small="--kinds stream", given=STREAMS),
    _training("training", 40, "--optimizers [muon,adamw]"),
    # if time is left
    _frames("frame_loop-warps", 70, "--batches 128 --beams 10 --engines triton --warps 1 2 4 8 --rounds 3"),
    Step("sanitizer", 90, "tools/gpu/smoke.py --device {device} --limit 80 --under 'compute-sanitizer "
         "--error-exitcode 9' --kernels search-ranked search-ahead lm-norm lm-gate --output {result}",
         cpu="--under env --kernels native", trusts=False),
    _frames("frame_loop-rest", 40,
            "--batches 1 32 128 --beams 10 --engines triton torchaudio torch --rounds 2"),
    _tree("llm_tree-64", 40, "--models mistral-7b --ways 'lazy tree'", 64),
    _tree("llm_tree-ways", 60, "--models mistral-7b --ways 'full texts' 'path caches' 'eager tree'"),
    _tree("llm_tree-3b", 40, "--models open-llama-3b --ways 'lazy tree' 'lazy, unfused'"),
    # call 2
    Step("train", 600, "tools/gpu_train.sh --device {device} --minutes {minutes} --out {out}",
         cpu="--minutes 3 --tiny", call=2, given=("call2/text", "--text {payload}/call2/text")),
    # not on the day: by --only alone, for those who have more time
    _frames("frame_loop-wide", 300, "--batches 1 32 128 --beams 10 20 50", call=0),
    _bench("scaling", 300, "scaling --batches 8 32 128",
           cpu="--batches 1 2 --beams 2 4 --frames 20 40 --intervals 8 16 --rounds 1", call=0),
    _fusion("fusion-beams", 300, "--beams 5 10 20 50", call=0),
    _bench("long_audio", 300, "long_audio --minutes 2 10", cpu="--minutes 0.1", call=0),
    Step("kernel_registers", 300, "tools/bench/kernel_registers.py --output {result}",
         cpu="--forms alone --beams 4 --warps 1", call=0),
    Step("data_pipeline", 300, "tools/bench/data_pipeline.py --cuts 200000 --output {result}",
         cpu="--cuts 2000 --lhotse_cuts 500", call=0),
    Step("host", 120, "tools/bench/host.py --device cpu --output {result}",
         cpu="--batch 2 --beams 2 --sentences 4 --rounds 1", call=0),
    _bench("fbank", 120, "fbank --backends [lhotse]", cpu="--minutes 0.2 --rounds 1", call=0),
)


def select(call: int, only: Sequence[str]) -> list[Step]:
    """Return the steps of a call, or those that are named.

    Raises:
        ValueError: a name is not known.
    """
    names = [step.name for step in STEPS]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"--only must name steps ({', '.join(names)}), but has {', '.join(unknown)}")
    if only:
        return [step for step in STEPS if step.name in only]
    return [step for step in STEPS if step.call == call]
