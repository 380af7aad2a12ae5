"""The import law: at run time a file imports only files of lower rank; optional packages have owners.
Knows: source text. Must not know: anything at run time.
"""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "icefall_fusion"

#: The folders in their order: a folder imports itself and those above it.
ORDER = re.findall(r"^\| `(\w+)/` \|", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
#: Optional or heavy packages and the only files that may import them.
OWNERS = {
    "k2": {"lattice/k2_fsas"},
    "kaldilm": {"lattice/compose"},
    "kaldialign": {"scoring/wer"},
    "espeakng_loader": {"data/espeak"},
    "kaldifeat": {"data/fbank"},
    "matplotlib": {"scoring/plot"},
    "jsonargparse": {"common/command_line"},
    "onnx": {"acoustic/sherpa_export"},
    "onnxruntime": {"acoustic/sources/onnx_files"},
    "tensorboard": {"train/training_log"},
    "transformers": {
        "data/tokenizers", "acoustic/sources/huggingface", "train/llama",
        "lm/loading", "lm/gguf_files", "lm/quantization",
        "lm/tree_forward", "lm/tree_memory",
    },
    "accelerate": {"lm/loading"},  # transformers import these two; we ask whether they are there
    "gguf": {"lm/gguf_files"},
    "peft": {"lm/adapters"},
    "bitsandbytes": {"lm/quantization"},
    "torchao": {"lm/quantization"},
    "kenlm": {"ngram/word_ngram"},
    "jieba": {"fusion/boundaries"},
    "sounddevice": {"decode/live_audio"},
    "starlette": {"serve/app", "serve/session"},
    "uvicorn": {"serve/job"},
    "triton": {"search/engines/gpu_kernel", "lm/fused_kernels", "lm/fused_matmul", "lm/products"},
}
#: Files that must stay importable with Python 3.9 and torch 1.13.
OLD_PYTHON = (
    "nbest", "common/", "text/", "ngram/", "search/", "fusion/", "lattice/", "acoustic/emissions",
    "acoustic/saved", "__main__",
)

FILES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def rank(name: str) -> int:
    """Return the place of a file's folder in the order; nbest.py comes first, __main__.py last."""
    if "/" not in name:
        return {"__init__": -2, "nbest": 0, "__main__": len(ORDER)}[name]
    return ORDER.index(name.split("/")[0])


def run_time_imports(tree: ast.AST) -> list[str]:
    """Return every module imported or looked for outside ``if TYPE_CHECKING`` (lazy imports count too)."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append(node.module)
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            found.extend(name.value for name in node.args[:1] if isinstance(name, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def own_files(modules: list[str]) -> set[str]:
    """Return our files among imported modules, as paths without suffix."""
    names = set()
    for module in modules:
        if module.split(".")[0] == "icefall_fusion":
            path = "/".join(module.split(".")[1:])
            if path in FILES:
                names.add(path)
            elif f"{path}/__init__" in FILES:
                names.add(f"{path}/__init__")
    return names


def test_the_folders_page_lists_every_folder() -> None:
    assert sorted(ORDER) == sorted({name.split("/")[0] for name in FILES if "/" in name})


@pytest.mark.parametrize("name", FILES)
def test_a_folder_imports_only_itself_and_folders_above(name) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    for other in own_files(run_time_imports(tree)):
        assert rank(other) <= rank(name), f"{name} imports {other}, which stands below it"


def page_of(folder: str) -> str:
    """Return what a newcomer reads of a folder: README.md and docstrings of ``__init__``."""
    pages = [page.read_text(encoding="utf-8") for page in (PACKAGE / folder).rglob("README.md")]
    packages = (PACKAGE / folder).rglob("__init__.py")
    pages += [ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in packages]
    return "\n".join(pages)


@pytest.mark.parametrize("folder", [f for f in ORDER if re.search(r"\.py\b", page_of(f))])
def test_every_file_is_on_the_page_of_its_folder(folder) -> None:
    page = page_of(folder)
    files = {f.name for f in (PACKAGE / folder).rglob("*.*") if f.suffix in (".py", ".cpp", ".h")}
    missing = [f for f in files if f != "__init__.py" and not re.search(rf"\b{re.escape(f)}\b", page)]
    assert not missing, f"no page of {folder}/ names {sorted(missing)}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_optional_packages_are_imported_by_their_owners_alone(package) -> None:
    users = {
        name
        for name in FILES
        if any(
            package in module.split(".")  # torch.utils.tensorboard too
            for module in run_time_imports(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))
        )
    }
    assert users <= OWNERS[package], f"{package} is imported in {sorted(users - OWNERS[package])}"
    gone = OWNERS[package] & set(FILES) - users
    assert not gone, f"{package} is not imported in {sorted(gone)} any more"


@pytest.mark.parametrize("name", FILES)
def test_house_style(name) -> None:
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    if not text.strip():
        return
    assert ast.get_docstring(tree), f"{name} must open with a docstring"
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    others = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    assert imports or not others, f"{name} must start with from __future__ import annotations"


@pytest.mark.parametrize("name", [n for n in FILES if n != "search/engines/gpu_kernel"])
def test_files_and_functions_are_short(name) -> None:
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{name}: {node.name} has more than 60 lines"


def test_delayed_fusion_needs_few_files() -> None:
    """Who plugs an LLM into a decoder reads what these imports load, and no more."""
    program = (
        "import sys\n"
        "from icefall_fusion.fusion import DelayedFusion\n"
        "from icefall_fusion.lm import CausalLm\n"
        "from icefall_fusion.search import ctc_prefix_search\n"
        "print(*[m.__file__ for name, m in sys.modules.items() if name.split('.')[0] == 'icefall_fusion'])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(file) for file in done.stdout.split()]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert 10 < len(files) <= 32 and lines <= 5_000, f"{len(files)} files, {lines} lines"


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(OLD_PYTHON)])
def test_old_python_can_read_it(name) -> None:
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 9))  # refuses match statements
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Match), f"{name} uses match"
        if isinstance(node, ast.Call):
            words = {keyword.arg for keyword in node.keywords}
            called = ast.unparse(node.func)
            assert not (called == "zip" and "strict" in words), f"{name}:{node.lineno} uses zip(strict=)"
            new = called.endswith("dataclass") and words & {"slots", "kw_only"}
            assert not new, f"{name}:{node.lineno} uses dataclass options of Python 3.10"
