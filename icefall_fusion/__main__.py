"""The command line ``python -m icefall_fusion JOB``: the table of jobs.
Knows: names of jobs and their modules. Must not know: what a job does.
"""
from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple, Sequence

from icefall_fusion.common.checks import nearest
from icefall_fusion.common.command_line import DONE, REFUSED, refuse, run_job, start_log


class Job(NamedTuple):
    """A job: the module in the package whose function ``run`` it is, and its line of help."""

    module: str
    help: str


JOBS = {
    "train": Job("train.acoustic_model", "train the acoustic model (CTC, attention decoder, transducer)"),
    "export": Job("acoustic.sherpa_export", "write a transducer for sherpa-onnx"),
    "train-lm": Job("train.language_model", "train a causal language model (NLM, LLM)"),
    "train-ngram": Job("train.piece_ngram", "train an n-gram over the pieces"),
    "train-word-ngram": Job("train.word_ngram", "train an n-gram over words by lmplz"),
    "make-graph": Job("lattice.make_graph", "make decoding graphs by k2"),
    "make-lattices": Job("lattice.make_lattices", "make lattices from saved log-probs (k2)"),
    "decode": Job("decode.job", "decode test sets by any methods; WER and times"),
    "transcribe": Job("decode.transcribe", "print the text of audio files"),
    "serve": Job("serve.job", "transcribe live audio of many clients by WebSocket, with a page"),
    "tune": Job("decode.tune", "tune fusion weights on dev, from stored N-best scores"),
    "internal-lm": Job("decode.internal_lm", "estimate the prior of labels and an n-gram to be subtracted"),
    "tune-words": Job("decode.tune_words", "find when words sound and how sure they are, on dev"),
    "score": Job("scoring.score", "word error rate of hypotheses against references"),
    "report": Job("decode.report", "collect runs into a table and a plot; compare two methods"),
    "pruning-errors": Job("decode.pruning_errors", "what became of the words that a method has wrong"),
    "demo": Job("decode.demo", "speak and decode the built-in stories by all methods"),
    "prepare-text": Job("data.books", "cut books into utterances"),
    "select-utterances": Job("data.selection", "choose what is spoken"),
    "noise-cuts": Job("data.noise_cuts", "noise recordings to a manifest"),
    "export-transcripts": Job("data.transcripts", "texts of manifests"),
    "train-tokenizers": Job("data.tokenizers", "acoustic BPE, LLM tokens"),
    "prepare-lm-text": Job("data.lm_text", "token streams to train LMs on"),
    "synthesize": Job("data.synthesis", "speak utterances by eSpeak NG"),
    "compute-fbank": Job("data.fbank", "features of audio manifests"),
}
#: A decode multiplies matrices of many sizes. PyTorch and oneDNN each keep a kernel for up to 1,024 of them,
#: hundreds of MB after a while; with so few of them the time is the same.
_KERNELS_KEPT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
_OF_MANY_SIZES = ("decode", "transcribe", "serve", "tune", "tune-words", "internal-lm", "pruning-errors",
                  "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job.

    Args:
        arguments: as after ``python -m icefall_fusion``; None takes them from the command line.

    Returns:
        The exit code (see `common.command_line`).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    start_log()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_list_of_jobs())
        return DONE if arguments else REFUSED
    name, rest = arguments[0], arguments[1:]
    if name not in JOBS:
        return refuse(f"there is no job {name!r}{nearest(name, JOBS)}\n\n{_list_of_jobs()}")
    if name in _OF_MANY_SIZES:
        for variable, value in _KERNELS_KEPT.items():
            os.environ.setdefault(variable, value)  # read once, when PyTorch is imported
    module = importlib.import_module(f"icefall_fusion.{JOBS[name].module}")
    return run_job(module.run, rest, f"python -m icefall_fusion {name}")


def _list_of_jobs() -> str:
    width = max(map(len, JOBS)) + 2
    lines = [f"  {name:{width}}{job.help}" for name, job in JOBS.items()]
    head = "usage: python -m icefall_fusion JOB [--config FILE.yaml] [--section.option VALUE ...]\n\njobs:\n"
    return head + "\n".join(lines) + "\n\nThe options of a job: python -m icefall_fusion JOB --help"


if __name__ == "__main__":
    sys.exit(main())
