#!/usr/bin/env bash
# Build kaldifeat from its sources against the torch of .venv and install it there: features on a GPU by
# `compute-fbank --backend kaldifeat`. Idempotent. The wheel is kept and used again for the same versions of
# kaldifeat, torch, Python and C library.
#
#   bash tools/install_kaldifeat.sh              # after tools/setup_env.sh; 1-3 minutes, seconds from then on
#   bash tools/install_kaldifeat.sh --rebuild    # even if it is installed or kept
#
# Needs a C++17 compiler and make; no CUDA toolkit. Variables: VENV (default .venv), JOBS (compilers at a time),
# KALDIFEAT_CACHE (default ~/.cache/icefall_fusion/kaldifeat, or the same below XDG_CACHE_HOME).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
version=1.24 # the newest whose sources the package index has; its wheel there is for torch 1.8
pybind11=3.1.0
rebuild=no
for option in "$@"; do
  case "$option" in
    --rebuild) rebuild=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "install_kaldifeat.sh: unknown option $option (see --help)" >&2; exit 2 ;;
  esac
done
say() { echo "install_kaldifeat.sh: $*"; }
fail() { say "$*" >&2; exit 1; }

venv=${VENV:-.venv}
python=$venv/bin/python
[ -x "$python" ] || fail "no environment at $venv: run 'bash tools/setup_env.sh' first, or set VENV"
case "$python" in /*) ;; *) python=$PWD/$python ;; esac
described=$("$python" -c '
import platform, sysconfig, torch
print(torch.__version__, sysconfig.get_config_var("SOABI") + "-" + "".join(platform.libc_ver()))
') || fail "$venv has no torch to build for: run 'bash tools/setup_env.sh' first"
read -r torch platform <<<"$described"
cache=${KALDIFEAT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/icefall_fusion/kaldifeat}
kept=$cache/kaldifeat$version-pybind$pybind11-torch$torch-$platform
pip=("$python" -m pip --disable-pip-version-check)

works() { # says why not
  PYTHONPATH=$PWD "$python" - "$version" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import torch

from icefall_fusion.data.fbank import extract

found = importlib.metadata.version("kaldifeat")
assert found == sys.argv[1], f"kaldifeat {found} is installed, not {sys.argv[1]}"
from kaldifeat.torch_version import kaldifeat_torch_version as built_for  # noqa: E402

assert built_for == torch.__version__, f"it was built for torch {built_for}, not {torch.__version__}"
samples = np.random.default_rng(0).uniform(-0.5, 0.5, 16_007).astype(np.float32)
apart = (extract(samples, backend="kaldifeat") - extract(samples)).abs().max().item()
assert apart < 1e-3, f"its features differ from lhotse's by {apart}"
PYTHON
}

check_tools() {
  local name
  for name in "${CXX:-c++}" g++ clang++ ""; do
    if [ -z "$name" ]; then fail "needs a C++17 compiler (Debian: apt-get install g++), or set CXX"; fi
    if command -v "$name" >/dev/null; then break; fi
  done
  command -v make >/dev/null || fail "needs make (Debian: apt-get install make)"
}

fetch() { # folder, what pip is to do: into it
  local folder=$1
  shift
  quietly "${pip[@]}" "$@" || fail "pip could not fetch the above: is the package index reachable?"
  local archive
  for archive in "$folder"/*.tar.gz; do
    if [ -e "$archive" ]; then tar -xzf "$archive" -C "$folder" --strip-components 1; fi
  done
}

# kaldifeat has no CUDA code: like torch's own CppExtension it only links torch's libraries, so what its cmake
# finds as "Torch" need not look for a CUDA toolkit. TORCH_DIR is set by kaldifeat.
write_torch_config() {
  mkdir -p "$1"
  cat >"$1/TorchConfig.cmake" <<'CMAKE'
include_directories(SYSTEM ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
set(TORCH_LIBRARIES ${TORCH_DIR}/lib/libtorch.so ${TORCH_DIR}/lib/libtorch_cpu.so ${TORCH_DIR}/lib/libc10.so)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH FALSE) # no path of this environment: importing torch loads its libraries
set(Torch_FOUND TRUE)
CMAKE
}

build() { # folder for the work: leaves the wheel in $kept
  local work=$1 modules=("setuptools>=70.1,<82" wheel) jobs=${JOBS:-}
  check_tools
  if [ -z "$jobs" ]; then jobs=$(nproc); fi
  say "building kaldifeat $version for torch $torch, $jobs compilers at a time; this takes minutes"
  fetch "$work/modules" install --target "$work/modules" "${modules[@]}"
  if ! printf '3.18\n%s\n' "$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p')" | sort -CV; then
    fetch "$work/cmake" install --target "$work/cmake" cmake # none here, or too old
    PATH=$work/cmake/cmake/data/bin:$PATH
  fi
  fetch "$work/pybind11" download --no-deps --no-binary pybind11 -d "$work/pybind11" "pybind11==$pybind11"
  fetch "$work/kaldifeat" download --no-deps --no-binary kaldifeat -d "$work/kaldifeat" "kaldifeat==$version"
  write_torch_config "$work/torch"
  local args="-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_STANDARD=17 -DPYTHON_EXECUTABLE='$python'"
  # torch's headers are most of the work: read them for many sources at once, and not for a program nobody needs
  args="$args -DCMAKE_UNITY_BUILD=ON -DCMAKE_SKIP_INSTALL_ALL_DEPENDENCY=ON"
  args="$args -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF" # torch does the computing
  args="$args -DTorch_DIR='$work/torch' -DFETCHCONTENT_SOURCE_DIR_PYBIND11='$work/pybind11'"
  if ! env PYTHONPATH="$work/modules" KALDIFEAT_CMAKE_ARGS="$args" KALDIFEAT_MAKE_ARGS="-j$jobs" \
    "${pip[@]}" wheel -v --no-build-isolation --no-deps --no-index -w "$work/wheel" "$work/kaldifeat" \
    >"$work/build.log" 2>&1; then
    mkdir -p "$cache" && cp "$work/build.log" "$cache/"
    grep -iE -A 3 '(error|fatal|killed)[: ]' "$work/build.log" | head -n 20 >&2 || true
    fail "kaldifeat could not be built (see above; all of it: $cache/build.log)"
  fi
  mkdir -p "$kept"
  local wheel
  wheel=$(basename "$work/wheel"/*.whl)
  cp "$work/wheel/$wheel" "$kept/.$wheel.$$"
  mv "$kept/.$wheel.$$" "$kept/$wheel" # whole or not at all
}

install_kept() {
  quietly "${pip[@]}" install --no-deps --no-index --force-reinstall "$kept"/*.whl && works
}

if [ "$rebuild" = no ] && works 2>/dev/null; then
  say "kaldifeat $version for torch $torch is installed in $venv"
  exit 0
fi
ensure_pip "$python"
if [ "$rebuild" = no ] && compgen -G "$kept/*.whl" >/dev/null; then
  if install_kept; then say "installed kaldifeat $version into $venv, built before"; exit 0; fi
  say "what was built before does not work here (see above); building it again: $kept" >&2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build "$work"
install_kept || fail "kaldifeat was built and does not work, see above"
say "installed kaldifeat $version into $venv"
