"""The command line: every job has a help, unknown and ill-typed options are refused, exit codes.
Knows: icefall_fusion.__main__, common.command_line. Must not know: what jobs do.
"""
from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field, is_dataclass
from typing import Literal, Optional, Union, get_type_hints

import pytest

from icefall_fusion.__main__ import JOBS, Job, main
from icefall_fusion.common.command_line import make_parser, parse_options


@dataclass(frozen=True)
class Inner:
    """Inner options.

    Args:
        beam: hypotheses kept a frame,
            at least 1.
        mode: how.
    """

    beam: int = 10
    mode: Literal["fast", "exact"] = "fast"

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"Inner.beam must be at least 1, but is {self.beam}")


@dataclass(frozen=True)
class Outer:
    """Do something.

    Args:
        out: folder, 100 % needed.
        files: inputs.
        search: how to search.
        weights: by method.
        methods: names.
        limit: none means all.
    """

    out: str
    files: list[str] = field(metadata={"positional": True})
    search: Inner = field(default_factory=Inner)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    methods: Union[str, list[str]] = "all"
    limit: Optional[int] = None


def run(options: Outer) -> int:
    if options.out == "broken":
        raise RuntimeError("it broke")
    if options.out == "missing":
        raise FileNotFoundError("no file at missing")
    if options.out == "absent":
        raise ModuleNotFoundError("pip install something")
    if options.out == "folder":
        open("/")
    print(options)
    return 0


@pytest.fixture()
def job(monkeypatch):
    monkeypatch.setitem(sys.modules, "icefall_fusion.toy", sys.modules[__name__])
    monkeypatch.setitem(JOBS, "toy", Job("toy", "toy job"))


def outer(*arguments: str) -> Outer:
    return parse_options(Outer, arguments, "toy")


@dataclass(frozen=True)
class Lists:
    """Lists by name.

    Args:
        runs: folders.
        splits: names.
        limit: none means all.
    """

    runs: list[str]
    limit: Optional[int] = 3
    splits: tuple[str, ...] = ("train", "dev")


@pytest.mark.parametrize("words", [["a", "b"], ["[a,b]"], ["[a, b]"]])
def test_lists_are_words_or_yaml_and_none_is_null(words) -> None:
    assert parse_options(Lists, ["--runs", *words, "--limit", "none"], "toy") == Lists(["a", "b"], None)
    assert parse_options(Lists, ["--runs", "a b"], "toy") == Lists(["a b"])  # one folder with a space
    made = parse_options(Lists, ["--splits", "dev", "test", "--runs", "a"], "toy")
    assert made == Lists(["a"], splits=("dev", "test"))


def test_values_without_a_name_are_refused(capsys) -> None:
    assert main(["score", "ref.txt", "hyp.txt"]) == 2
    assert "give these values the name of an option: ref.txt hyp.txt" in capsys.readouterr().err


def test_a_missing_package_and_a_folder_for_a_file_are_one_line(job, capsys) -> None:
    assert main(["toy", "--out", "absent", "f"]) == 2
    assert capsys.readouterr().err == "error: pip install something\n"
    assert main(["toy", "--out", "folder", "f"]) == 2
    assert capsys.readouterr().err == "error: Is a directory: /\n"


def test_list_of_jobs(capsys) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in JOBS)
    assert main([]) == 2


@pytest.mark.parametrize("name", sorted(JOBS))
def test_every_job_has_help_and_described_options(name, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"icefall_fusion {name}" in text and "--config" in text
    module = importlib.import_module(f"icefall_fusion.{JOBS[name].module}")
    options = get_type_hints(module.run)["options"]
    assert is_dataclass(options) and options.__dataclass_params__.frozen
    parser = make_parser(options, name)
    missing = [action.dest for action in parser._actions if (action.help or "(")[0] == "("]
    missing += [group.title for group in parser._action_groups if "<class" in (group.title or "")]
    assert not missing, f"{options.__name__} must describe its fields in the docstring, but lacks {missing}"


def test_values_lists_and_overrides(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("out: there\nsearch: {beam: 4}\nweights: {a: {llm: 0.5}}\n")
    made = outer("--config", str(config), "--search.mode", "exact", "--methods", "[x,y]", "f1", "f2")
    assert made == Outer("there", ["f1", "f2"], Inner(4, "exact"), {"a": {"llm": 0.5}}, ["x", "y"])
    assert outer("--config", str(config), "--search.beam=5", "f").search.beam == 5
    assert outer("--out", "o", "--methods", "x,y", "--limit", "3", "f") == Outer(
        "o", ["f"], methods="x,y", limit=3
    )
    by_key = outer("--out", "o", "--weights.a.llm", "0.5", "--weights.b", "{llm: 1.5}", "f")
    assert by_key.weights == {"a": {"llm": 0.5}, "b": {"llm": 1.5}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o", "--serch.beam", "3", "f"], "no option --serch.beam; did you mean 'search.beam'"),
        (["--out", "o", "--search.bem", "3", "f"], "no option --search.bem; did you mean 'search.beam'"),
        (["--outt=o", "f"], "no option --outt; did you mean 'out'"),
        (["--out", "o", "--search.beam", "many", "f"], "--search.beam: Expected a <class 'int'>"),
        (["--out", "o", "--search.mode", "fsat", "f"], "fsat"),
        (["--out", "o", "--search.beam", "0", "f"], "Inner.beam must be at least 1, but is 0"),
        (["--out", "o"], "required: files"),
        (["--out", "o", "--bem", "3", "f"], "no option --bem; did you mean 'search.beam'"),
        (["--out", "o", "--limit", "many", "f"], "Given value: many"),
        (["--out", "o", "--search.beam.size", "3", "f"], "no option --search.beam.size"),
        (["f"], "out"),
        (["--config", "no.yaml", "f"], "no.yaml"),
    ],
)
def test_wrong_options_are_refused_by_name(arguments, message, job, capsys) -> None:
    assert main(["toy", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["search: {bem: 4}\nout: o\n", "serch: {beam: 4}\nout: o\n"])
def test_wrong_names_in_a_file_are_refused_too(text, tmp_path, job, capsys) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["toy", "--config", str(tmp_path / "c.yaml"), "f"]) == 2
    assert "did you mean 'search.beam'" in capsys.readouterr().err


def test_help_takes_texts_from_docstrings(job, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["toy", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "hypotheses kept a frame, at least 1." in text and "folder, 100 % needed." in text


def test_exit_codes(job, capsys) -> None:
    assert main(["toy", "--out", "o", "f"]) == 0
    assert main(["toy", "--out", "missing", "f"]) == 2
    assert "error: no file at missing" in capsys.readouterr().err
    assert main(["toy", "--out", "broken", "f"]) == 1
    assert main(["decod"]) == 2
    assert "did you mean 'decode'" in capsys.readouterr().err


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "icefall_fusion", "score", "--reff", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "did you mean 'ref'" in done.stderr


def test_a_decode_keeps_few_kernels_unless_the_environment_says_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    assert main(["report", "--nothing", "1"]) == 2
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
    assert main(["decode", "--nothing", "1"]) == 2
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
