#!/usr/bin/env bash
# Make or update .venv-k2: Python 3.9, torch 1.13.1, k2 1.23.4. It tests all code for k2 on the CPU of any machine.
# For decoding, see tools/install_k2.sh. Does nothing if tools/requirements-k2-ci.txt has not changed.
#
#   bash tools/setup_k2_ci_env.sh             # needs Python 3.9; about 4 GB, 2 minutes
#   PYTHON39=/opt/python3.9/bin/python bash tools/setup_k2_ci_env.sh
#   bash tools/setup_k2_ci_env.sh --required  # without Python 3.9: fails (also with CI set in the environment)
#
# Exit codes: 0 the environment is ready, 77 skipped (no Python 3.9), others: failed.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
required=${CI:-}
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --required) required=true ;;
  "") ;;
  *) echo "setup_k2_ci_env.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
esac

venv=${VENV_K2:-.venv-k2}
is_39() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 9))' 2>/dev/null; }
find_python() { # the first Python 3.9 of PYTHON39, PATH and pyenv
  local root candidate
  root=$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-$HOME/.pyenv}")
  for candidate in ${PYTHON39:-} python3.9 "$root"/versions/3.9*/bin/python; do
    if is_39 "$candidate"; then echo "$candidate"; return; fi
  done
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  if ! python=$(find_python); then
    echo "setup_k2_ci_env.sh: there is no Python 3.9 on PATH or in pyenv (pyenv install 3.9, or set PYTHON39)" >&2
    if [ -n "$required" ]; then
      echo "setup_k2_ci_env.sh: it is required here: failed" >&2
      exit 1
    fi
    echo "setup_k2_ci_env.sh: SKIPPED: k2 is not tested on this machine" >&2
    exit 77
  fi
  echo "setup_k2_ci_env.sh: making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || { rm -rf "$venv"; exit 1; }
fi
stamp=$venv/.requirements
wanted=$(sha1sum <tools/requirements-k2-ci.txt)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
  exit 0
fi
echo "setup_k2_ci_env.sh: installing torch 1.13.1, k2 1.23.4 and the packages for tests (about 4 GB)"
ensure_pip "$venv/bin/python"
quietly "$venv/bin/python" -m pip --disable-pip-version-check install -r tools/requirements-k2-ci.txt
"$venv/bin/python" tools/check_k2.py
echo "$wanted" >"$stamp"
echo "setup_k2_ci_env.sh: $venv is ready"
