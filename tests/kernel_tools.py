"""Compiles Triton kernels for GPUs that are not here and reads what the compiler made of them.
Knows: Triton, its copy of cuobjdump. Must not know: any kernel.

Run it without TRITON_INTERPRET: the interpreter's kernels cannot be compiled.
"""
from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """What a kernel needs: bytes of shared memory a program, registers and bytes of spills a thread."""

    shared: int
    registers: int
    spilled: int


def compile_kernel(
    kernel: Any, kinds: Sequence[Optional[str]], constants: Mapping[str, Any], options: Mapping[str, Any],
    capability: int = 90, unaligned: Sequence[str] = ("*i64", "*i32"),
) -> Any:
    """Return a kernel compiled for a GPU.

    Args:
        kernel: the function.
        kinds: types of its arguments that are no constants, in order; None: the argument is None.
        constants: its other arguments, by name.
        options: warps and stages.
        capability: 90 for H100 and H200.
        unaligned: pointers to these may point anywhere; others to multiples of 16 bytes.
    """
    names = kernel.arg_names
    constants = {**constants, **{name: None for name, kind in zip(names, kinds) if kind is None}}
    types = {name: "constexpr" if name in constants else kind for name, kind in zip(names, kinds)}
    types.update(dict.fromkeys(constants, "constexpr"))
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds)
        if kind is not None and kind.startswith("*") and kind not in unaligned
    }
    source = ASTSource(kernel, {name: types[name] for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def resources(made: Any) -> Resources:
    """Return what a compiled kernel needs."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(made.metadata.shared, found["REG"], max(found["STACK"], found["LOCAL"]))
