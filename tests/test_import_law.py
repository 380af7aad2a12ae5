"""The import law: at run time a file imports only files of lower rank; optional packages have owners.
Knows: source text. Must not know: anything at run time.
"""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "icefall_fusion"

#: Ranks of the design page; what it leaves open has a rank between. Files of a folder may import each other.
RANKS = {
    "__init__": -1, "checks": -1, "devices": -0.5, "files": -1, "native_build": -1,
    "text": 0, "nbest": 0,
    "ngram": 1, "wer": 1, "plot": 0.5, "report": 1, "runlog": 1, "results": 1.2, "tokens": 1,
    "lexicon": 1.1, "data/": 1.5,
    "models/": 2, "emission_batch": 2, "utterances": 2, "emissions": 2.5,
    "lm/": 3, "search/": 3, "training/": 3,
    "fusion/": 4, "rescoring": 4.5,
    "lattice_files": 4.3, "lattices": 4.4, "lattice_methods": 4.5, "make_graph": 4.5, "make_lattices": 4.6,
    "shards": 3, "lms": 4.6, "stretches": 4.6, "memory_plan": 4.6, "memory_watch": 4.7,
    "methods": 5, "decode_options": 5.1,
    "train": 5, "train_lm": 5, "train_ngram": 5, "train_word_ngram": 5,
    "decode": 5.2, "pretrained": 5.4, "tune": 5.4, "transcribe": 5.6, "demo": 5.6, "__main__": 6,
}  # fmt: skip
#: Optional or heavy packages and the only files that may import them.
OWNERS = {
    "k2": {"search/lattice"},
    "kaldilm": {"search/make_graph"},
    "kaldialign": {"wer"},
    "espeakng_loader": {"data/espeak"},
    "kaldifeat": {"data/fbank"},
    "matplotlib": {"plot"},
    "jsonargparse": {"__main__"},
    "tensorboard": {"training/journal"},
    "transformers": {
        "data/tokenizers", "emissions", "train_lm",
        "lm/causal_lm", "lm/packed_attention", "lm/tree_cache", "lm/vocabulary",
    },
    "accelerate": {"lm/causal_lm"},  # transformers import these two; we ask whether they are there
    "bitsandbytes": {"lm/causal_lm"},
    "torchao": {"lm/causal_lm"},
    "triton": {"search/device_kernel", "lm/fused_kernels"},
}  # fmt: skip
#: Files that must stay importable with Python 3.9 and torch 1.13.
OLD_PYTHON = (
    "nbest", "ngram", "text", "tokens", "checks", "devices", "files", "native_build", "search/", "fusion/",
    "lexicon", "emission_batch", "lattice_files", "lattices", "make_graph", "make_lattices", "__main__",
)  # fmt: skip

FILES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def rank(name: str) -> float:
    folder = name.split("/")[0] + "/" if "/" in name else None
    if folder is not None:
        return RANKS[folder]
    assert name in RANKS, f"{name}.py has no rank: give it one in {Path(__file__).name}"
    return RANKS[name]


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


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_lower_ranks(name) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    mine = rank(name)
    for other in own_files(run_time_imports(tree)):
        same_folder = "/" in name and other.split("/")[0] == name.split("/")[0]
        lower = same_folder or rank(other) < mine
        assert lower, f"{name} (rank {mine}) imports {other} (rank {rank(other)})"


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
