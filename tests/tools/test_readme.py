"""Every command that a README shows exists: its job, its options, its script's help.
Knows: the command lines in markdown files. Must not know: what they do.
"""
from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from icefall_fusion.__main__ import JOBS
from icefall_fusion.common.command_line import option_types

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *ROOT.glob("egs/*/ASR/*.md"), *ROOT.glob("icefall_fusion/*/README.md")]


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of every shell line in a code block, continuation lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if line and not line.startswith("#"):
                    found.append((str(page.relative_to(ROOT)), line))
    return found


JOB_LINES = [(page, line) for page, line in commands() if "-m icefall_fusion " in line]
SCRIPTS = sorted(
    {
        (page, found.group(1))
        for page, line in commands()
        if (found := re.match(r"(?:bash +)?((?:\./|[\w/.]+/)?[\w]+\.sh)\b", line))
    }
)


@pytest.mark.parametrize(("page", "line"), JOB_LINES)
def test_jobs_and_options_exist(page, line) -> None:
    words = line.split("-m icefall_fusion ")[1].split()
    assert words[0] in JOBS or words[0] == "--help", f"{page}: no job {words[0]}"
    if words[0] in JOBS:
        job = JOBS[words[0]]
        module = importlib.import_module(f"icefall_fusion.{job.module}")
        names = ["config", *option_types(get_type_hints(module.run)["options"])]
        leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        for option in re.findall(r"(?<= )--([\w.\-]+)", line):
            known = option in [*leaves, "help"] or option.rsplit(".", 1)[0] in leaves  # a key of a mapping
            assert known, f"{page}: {words[0]} has no option --{option}"


@pytest.mark.parametrize(("page", "script"), SCRIPTS)
def test_scripts_have_help(page, script) -> None:
    places = [ROOT / script, ROOT / Path(page).parent / script, ROOT / "egs/minibooks/ASR" / script]
    path = next((place for place in places if place.exists()), None)
    assert path is not None, f"{page}: there is no {script}"
    done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and path.name in done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("egs/*/ASR/*.sh")))
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config"], "--config needs a value"),
        (["--confg", "tiny"], "unknown option --confg"),
        (["--config", "tinny"], "must be 'full' or a folder of conf/, but is 'tinny'"),
        (["--stage", "two"], "--stage"),  # a number, or refused
    ],
)
def test_recipes_refuse_wrong_options(path, options, message) -> None:
    done = subprocess.run(["bash", str(path), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{path.name}: " in done.stderr and message in done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("egs/*/ASR/*.sh")) + sorted(ROOT.glob("tools/*.sh")))
def test_every_script_is_valid_and_has_help(path) -> None:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    done = subprocess.run(["bash", str(path), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_shellcheck_finds_nothing() -> None:
    folders = ("egs/*.sh", "egs/*/ASR/*.sh", "egs/*/ASR/local/*.sh", "tools/*.sh", "tools/*/*.sh")
    scripts = [*(path for folder in folders for path in ROOT.glob(folder)), ROOT / ".ci/run"]
    command = [str(Path(sys.executable).parent / "shellcheck"), "-x", "-P", "SCRIPTDIR", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_page_has_a_figure_that_was_never_filled_in() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("egs/**/*.md"), *ROOT.glob("icefall_fusion/**/*.md")]
    assert len(pages) > 5
    for page in pages:
        assert not re.findall(r"@[A-Z0-9]+@", page.read_text(encoding="utf-8")), page
