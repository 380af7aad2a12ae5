"""The command line ``python -m icefall_fusion JOB``: options are generated from each job's dataclass.
Knows: names of jobs, where their options live, exit codes, the log format. Must not know: what a job does.

Exit codes: 0 done; 1 failed (the last line says why); 2 refused (an option or an input is wrong); 3 done,
but some inputs were skipped (they are listed); 130 stopped by the keyboard.

``ICEFALL_FUSION_LOG=debug`` in the environment shows more, also where in the code an input was refused.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import typing
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from icefall_fusion.common.checks import nearest
from icefall_fusion.common.unavailable import Unavailable

DONE, FAILED, REFUSED, SKIPPED_SOME, INTERRUPTED = 0, 1, 2, 3, 130
LOG_FORMAT = "%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] %(message)s"


class Job(NamedTuple):
    """Where a job lives: its module (from the package), options class, line of help, function.

    ``positional`` is the field of the options that takes the arguments without a name.
    """

    module: str
    options: str
    help: str
    function: str = "run"
    positional: str = ""


JOBS: dict[str, Job] = {
    "train": Job(".train.acoustic_model", "TrainOptions", "train the CTC-AED acoustic model"),
    "train-lm": Job(".train.language_model", "TrainLmOptions", "train a causal language model (NLM, LLM)"),
    "train-ngram": Job(".train.piece_ngram", "TrainNgramOptions", "train an n-gram over the pieces"),
    "train-word-ngram": Job(
        ".train.word_ngram", "TrainWordNgramOptions", "train an n-gram over words by lmplz"
    ),
    "make-graph": Job(".lattice.make_graph", "MakeGraphOptions", "make decoding graphs by k2"),
    "make-lattices": Job(
        ".lattice.make_lattices", "MakeLatticesOptions", "make lattices from saved log-probs (k2)"
    ),
    "decode": Job(".decode.job", "DecodeOptions", "decode test sets by any methods; WER and times"),
    "transcribe": Job(
        ".decode.transcribe", "TranscribeOptions", "print the text of audio files", positional="files"
    ),
    "tune": Job(".decode.tune", "TuneOptions", "find fusion weights on dev from stored N-best scores"),
    "score": Job(".scoring.wer", "ScoreOptions", "word error rate of hypotheses against references"),
    "report": Job(".scoring.table", "ReportOptions", "collect decode runs into a table and a plot"),
    "demo": Job(".decode.demo", "DemoOptions", "speak and decode the built-in stories by all methods"),
    "prepare-text": Job(".data.books", "PrepareTextOptions", "cut books into utterances"),
    "select-utterances": Job(".data.selection", "SelectOptions", "choose what is spoken"),
    "noise-cuts": Job(".data.noise_cuts", "NoiseCutsOptions", "noise recordings to a manifest"),
    "export-transcripts": Job(".data.transcripts", "TranscriptsOptions", "texts of manifests"),
    "train-tokenizers": Job(".data.tokenizers", "TokenizerOptions", "acoustic BPE, LLM tokens"),
    "prepare-lm-text": Job(".data.lm_text", "LmTextOptions", "token streams to train LMs on"),
    "synthesize": Job(".data.synthesis", "SynthesizeOptions", "speak utterances by eSpeak NG"),
    "compute-fbank": Job(".data.fbank", "FbankOptions", "features of audio manifests"),
}


#: A decode multiplies matrices of ever other sizes. PyTorch and oneDNN each keep a kernel for up to 1,024 of
#: them, hundreds of MB after a while; with so few of them the time is the same.
_KERNELS_KEPT = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
_OF_MANY_SIZES = ("decode", "transcribe", "tune", "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job.

    Args:
        arguments: as after ``python -m icefall_fusion``; None takes them from the command line.

    Returns:
        The exit code (see the top of the file).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    level = logging.DEBUG if os.environ.get("ICEFALL_FUSION_LOG", "").lower() == "debug" else logging.INFO
    logging.basicConfig(level=level, format=LOG_FORMAT)
    logging.captureWarnings(True)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_list_of_jobs())
        return DONE if arguments else REFUSED
    name, rest = arguments[0], arguments[1:]
    if name not in JOBS:
        return _refuse(f"there is no job {name!r}{nearest(name, JOBS)}\n\n{_list_of_jobs()}")
    job = JOBS[name]
    if name in _OF_MANY_SIZES:
        for variable, value in _KERNELS_KEPT.items():
            os.environ.setdefault(variable, value)  # read once, when PyTorch is imported
    module = importlib.import_module(job.module, "icefall_fusion")
    options_class = getattr(module, job.options)
    try:
        options = parse_options(options_class, rest, f"python -m icefall_fusion {name}", job)
    except (ValueError, TypeError, FileNotFoundError, argparse.ArgumentError) as error:
        return _refuse(f"{name}: {error}")
    return _run(getattr(module, job.function), options)


def _run(function: Callable[[Any], int], options: Any) -> int:
    try:
        return int(function(options) or DONE)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return INTERRUPTED
    except _REFUSED as error:  # a wrong input: the message says which
        logging.debug("refused", exc_info=True)
        return _refuse(_message(error))
    except OSError as error:  # a full disk, a broken one
        if error.filename is None:
            logging.exception("the job failed")
        else:
            logging.debug("failed", exc_info=True)
            print(f"error: {_message(error)}; what was finished before is kept", file=sys.stderr)
        return FAILED
    except Exception:
        logging.exception("the job failed")
        return FAILED


#: Errors of inputs, not of the code: files, options, and optional packages that are not installed.
_REFUSED = (
    ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError,
    ModuleNotFoundError, Unavailable,
)  # fmt: skip


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"  # the system's own: without its number
    return str(error)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return REFUSED


def _list_of_jobs() -> str:
    width = max(map(len, JOBS)) + 2
    lines = [f"  {name:{width}}{job.help}" for name, job in JOBS.items()]
    head = "usage: python -m icefall_fusion JOB [--config FILE.yaml] [--section.option VALUE ...]\n\njobs:\n"
    return head + "\n".join(lines) + "\n\nThe options of a job: python -m icefall_fusion JOB --help"


# --- options from dataclasses -------------------------------------------------------------------------


def parse_options(options_class: type, arguments: Iterable[str], program: str, job: Job | None = None) -> Any:
    """Make an options object from command-line arguments and the YAML file that ``--config`` names.

    Args:
        options_class: a frozen dataclass; nested dataclasses become ``--section.option``.
        arguments: the command line after the job's name.
        program: shown by ``--help``.
        job: which field takes the arguments without a name.

    Raises:
        ValueError: an option is unknown (the message gives the nearest name), ill-typed or out of its range.
    """
    positional = job.positional if job else ""
    parser = _make_parser(options_class, program, positional)
    try:
        values = parser.parse_args(_plain_values(options_class, arguments, positional))
        made = parser.instantiate(values)
    except argparse.ArgumentError as error:
        raise ValueError(_explain(str(error), _option_names(options_class))) from error
    names = {field.name for field in dataclasses.fields(options_class)}
    return options_class(**{name: value for name, value in vars(made).items() if name in names})


def _plain_values(options_class: type, arguments: Iterable[str], positional: str) -> list[str]:
    """Return the arguments as jsonargparse takes them: ``--runs a b`` as one list, ``none`` as null."""
    hints = {name: hint for name, hint in _leaf_types(options_class) if name != positional}
    plain, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        plain.append(word)
        hint = hints.get(word[2:]) if word.startswith("--") else None
        if hint in (list[str], tuple[str, ...]):
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            is_list = len(values) == 1 and values[0].startswith("[")
            plain += values if is_list or not values else [json.dumps(values)]
        elif type(None) in typing.get_args(hint) and rest and rest[0].lower() == "none":
            rest[0] = "null"
    return plain


def _make_parser(options_class: type, program: str, positional: str) -> Any:
    import jsonargparse

    description = inspect.cleandoc(options_class.__doc__ or "").split("\n\nArgs:")[0]
    usage = f"{program} [--config FILE.yaml] [--option VALUE ...]"
    usage += f" {positional.upper()} ..." if positional else ""
    parser = jsonargparse.ArgumentParser(
        prog=program, usage=usage, description=description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(options_class, skip={positional} if positional else set())
    if positional:
        parser.add_argument(positional, nargs="+", type=str)
    texts = dict(_field_texts(options_class))
    for group in parser._action_groups:
        if "<class" in (group.title or ""):
            section = group._group_actions[0].dest.partition(".")[0]
            names = [action.dest for action in group._group_actions]
            nested = all(name == section or name.startswith(f"{section}.") for name in names)
            group.title = f"{section} ({texts[section].rstrip('.')})" if nested else "options of this job"
    for action in parser._actions:
        if texts.get(action.dest):
            action.help = texts[action.dest]
    return parser


def _field_texts(options_class: type, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield option name and description, read from the "Args:" sections of the (nested) dataclasses."""
    described: dict[str, str] = {}
    for base in reversed(options_class.__mro__):
        described |= _args_section(base) if dataclasses.is_dataclass(base) else {}
    for name, nested in _fields(options_class):
        yield prefix + name, described.get(name, "")
        if nested is not None:
            yield from _field_texts(nested, f"{prefix}{name}.")


def _args_section(options_class: type) -> dict[str, str]:
    text = inspect.cleandoc(options_class.__doc__ or "")
    _, found, section = text.partition("Args:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines() if found else []:
        if not line.strip() or not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+)(?: \([^)]*\))?: +(.*)", line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2)
        elif name:
            texts[name] += " " + line.strip()
    return texts


def _leaf_types(options_class: type, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the full name and the type of every option that takes a value."""
    hints = typing.get_type_hints(options_class)
    for name, nested in _fields(options_class):
        if nested is None:
            yield prefix + name, hints[name]
        else:
            yield from _leaf_types(nested, f"{prefix}{name}.")


def _fields(options_class: type) -> Iterable[tuple[str, type | None]]:
    """Yield each field's name and, where it is itself an options dataclass, that class."""
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        choices = [hints[field.name], *typing.get_args(hints[field.name])]
        nested = [choice for choice in choices if dataclasses.is_dataclass(choice)]
        yield field.name, nested[0] if nested else None


def _option_names(options_class: type) -> list[str]:
    return ["config", *(name for name, _ in _field_texts(options_class))]


_UNKNOWN = [
    re.compile(r"unrecognized arguments: +--([\w.\-]+)", re.IGNORECASE),
    re.compile(r"Option '([\w.\-]+)' is not accepted"),
]
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*)\]\s(?:.|\n)*Given value: (.*)"
)
_UNKNOWN_IN_GROUP = re.compile(r"Group '([\w.\-]+)' does not accept option '([\w.\-]+)'")


def _explain(message: str, names: list[str]) -> str:
    """Add the nearest option to a message about an unknown one."""
    grouped = _UNKNOWN_IN_GROUP.search(message)
    unknown = [f"{grouped.group(1)}.{grouped.group(2)}"] if grouped else []
    unknown += [found.group(1) for pattern in _UNKNOWN if (found := pattern.search(message))]
    if not unknown:
        message = re.sub(r'Parser key "([\w.\-]+)":\s*', r"--\1: ", message)
        message = _UNION.sub(r"Expected one of [\1]. Got value: \2", message)
        return re.sub(r"unrecognized arguments: (?!-)", "give these values the name of an option: ", message)
    last_parts = {name.rpartition(".")[2]: name for name in reversed(names)}
    hint = nearest(unknown[0], names)
    short = difflib.get_close_matches(unknown[0], last_parts, n=1, cutoff=0.5)  # --beem for --search.beam
    if not hint and short:
        hint = f"; did you mean {last_parts[short[0]]!r}?"
    return f"there is no option --{unknown[0]}{hint}"


if __name__ == "__main__":
    sys.exit(main())
