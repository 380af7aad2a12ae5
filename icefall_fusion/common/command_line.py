"""Command lines of jobs: options from a dataclass and its docstring, exit codes, the log.
Knows: dataclasses, jsonargparse. Must not know: any job.

Exit codes: 0 done; 1 failed (the last line says why); 2 refused (an option or an input is wrong); 3 done,
but some inputs were skipped (they are listed); 4 not finished, to be run again; 130 stopped by the keyboard.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import sys
import typing
from typing import Any, Callable, Iterable, Iterator, Mapping

import yaml

from icefall_fusion.common.checks import nearest
from icefall_fusion.common.unavailable import Unavailable

DONE, FAILED, REFUSED, SKIPPED_SOME, UNFINISHED, INTERRUPTED = 0, 1, 2, 3, 4, 130
_LOG_FORMAT = "%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] %(message)s"
#: Errors of inputs, not of the code: files, options, and optional packages that are not installed.
_REFUSED = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError,
            ModuleNotFoundError, Unavailable)
_KEY = 'Parser key "'  # how messages of jsonargparse begin that are about one option


def start_log() -> None:
    """Log to stderr, warnings too; ``ICEFALL_FUSION_LOG=debug`` in the environment shows more."""
    level = logging.DEBUG if os.environ.get("ICEFALL_FUSION_LOG", "").lower() == "debug" else logging.INFO
    logging.basicConfig(level=level, format=_LOG_FORMAT)
    logging.captureWarnings(True)


def run_job(function: Callable[[Any], int], arguments: Iterable[str], program: str) -> int:
    """Run a job with the options of its command line and return the exit code.

    Args:
        function: of the job; its parameter ``options`` is annotated with their dataclass.
        arguments: the command line after the job's name.
        program: shown by ``--help``; its last word names the job in messages.
    """
    options_class = typing.get_type_hints(function)["options"]
    try:
        options = parse_options(options_class, arguments, program)
    except (ValueError, TypeError, FileNotFoundError) as error:
        return refuse(f"{program.split()[-1]}: {error}")
    return exit_code(function, options)


def exit_code(function: Callable[[Any], int], options: Any) -> int:
    """Run a job and return its exit code; an error is printed or logged and has a code too."""
    try:
        return int(function(options) or DONE)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return INTERRUPTED
    except _REFUSED as error:  # a wrong input, which the message names
        logging.debug("refused", exc_info=True)
        return refuse(_message(error))
    except OSError as error:  # a full disk, a broken one
        if error.filename is None:
            logging.exception("the job failed")
        else:
            logging.debug("failed", exc_info=True)
            print(f"error: {_message(error)}; results before it are kept", file=sys.stderr)
        return FAILED
    except Exception:
        logging.exception("the job failed")
        return FAILED


def refuse(message: str) -> int:
    """Print an error and return the exit code of a refused input."""
    print(f"error: {message}", file=sys.stderr)
    return REFUSED


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"  # the system's own: without its number
    return str(error)


# --- options --------------------------------------------------------------------------------------------


def parse_options(options_class: type, arguments: Iterable[str], program: str) -> Any:
    """Make an options object from command-line arguments and the YAML files that ``--config`` names.

    Args:
        options_class: a frozen dataclass; nested dataclasses become ``--section.option``. A field with
            ``metadata={"positional": True}`` takes the arguments without a name.
        arguments: the command line.
        program: shown by ``--help``.

    Raises:
        ValueError: an option is unknown (the message gives the nearest name), ill-typed or out of its range.
    """
    types = option_types(options_class)
    parser = make_parser(options_class, program)
    try:
        made = parser.instantiate(parser.parse_args(_plain_values(arguments, types)))
    except argparse.ArgumentError as error:
        message = str(error).replace("unrecognized arguments:", "give these values the name of an option:")
        option, _, rule = message.partition('":')
        if option.startswith(_KEY):
            message = f"--{option[len(_KEY) :]}: {rule.strip()}"
        raise ValueError(message) from error
    names = {field.name for field in dataclasses.fields(options_class)}
    return options_class(**{name: value for name, value in vars(made).items() if name in names})


def make_parser(options_class: type, program: str) -> Any:
    """Return the parser of an options dataclass; texts of ``--help`` are those of its docstring."""
    import docstring_parser
    import jsonargparse

    style = docstring_parser.DocstringStyle.GOOGLE
    jsonargparse.set_parsing_settings(docstring_parse_style=style)
    docstring = docstring_parser.parse(options_class.__doc__ or "", style)
    texts = {param.arg_name: param.description for param in docstring.params}
    fields = dataclasses.fields(options_class)
    positional = [field.name for field in fields if field.metadata.get("positional")]
    usage = f"{program} [--config FILE.yaml] [--option VALUE ...]"
    usage += "".join(f" {name.upper()} ..." for name in positional)
    parser = jsonargparse.ArgumentParser(
        prog=program, usage=usage, description=docstring.description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(options_class, skip=set(positional))
    for name in positional:
        parser.add_argument(name, nargs="+", type=str, help=texts.get(name))
    return parser


def option_types(options_class: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of each option by its full name, sections before the options in them."""
    types: dict[str, Any] = {}
    hints = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        name, hint = prefix + field.name, hints[field.name]
        types[name] = hint
        for choice in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(choice):
                types.update(option_types(choice, f"{name}."))
    return types


def _plain_values(arguments: Iterable[str], types: Mapping[str, Any]) -> list[str]:
    """Return the arguments as jsonargparse takes them: ``--runs a b`` as one list, ``none`` as null.

    Raises:
        ValueError: an option is unknown, also in a file that ``--config`` names.
    """
    plain, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        plain.append(word)
        name, _, value = word[2:].partition("=")
        if not word.startswith("--") or (" " in word and name not in types):  # "--a 1 --b 2" is a value
            continue
        _check_known(name.rstrip("+"), types)
        if name == "config":
            for key in _keys_of_file(value or "".join(rest[:1]), types):
                _check_known(key, types)
        hint = types.get(name)
        if hint in (list[str], tuple[str, ...]) and "=" not in word:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            is_list = len(values) == 1 and values[0].startswith("[")
            plain += values if is_list or not values else [json.dumps(values)]
        elif type(None) in typing.get_args(hint) and rest and rest[0].lower() == "none":
            rest[0] = "null"
    return plain


def _keys_of_file(path: str, types: Mapping[str, Any]) -> Iterator[str]:
    """Yield the full names of the options in a YAML file; the parser refuses a file that is none."""

    def visit(values: Mapping[Any, Any], prefix: str) -> Iterator[str]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and not _is_mapping(types.get(name)):
                yield from visit(value, f"{name}.")
            else:
                yield name

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    if isinstance(values, dict):
        yield from visit(values, "")


def _check_known(name: str, types: Mapping[str, Any]) -> None:
    """Raise ValueError with the nearest name if there is no such option."""
    known = [*types, "config", "help", "print_config"]
    section = name.rpartition(".")[0]
    if name in known or (section in types and name == f"{section}.help"):
        return
    while section and section not in types:
        section = section.rpartition(".")[0]
    if _is_mapping(types.get(section)):
        return
    hint = nearest(name, known)
    by_last_word = {option.rpartition(".")[2]: option for option in reversed(known)}
    short = difflib.get_close_matches(name, by_last_word, n=1, cutoff=0.5)  # --beem for --search.beam
    if not hint and short:
        hint = f"; did you mean {by_last_word[short[0]]!r}?"
    raise ValueError(f"there is no option --{name}{hint}")


def _is_mapping(hint: Any) -> bool:
    return any(dict in (choice, typing.get_origin(choice)) for choice in (hint, *typing.get_args(hint)))
