#!/usr/bin/env bash
# Run the tests of k2 in the environment that tools/setup_k2_ci_env.sh makes.
#
#   bash tools/test_k2.sh                     # without Python 3.9: skipped, with a message
#   bash tools/test_k2.sh --required          # without Python 3.9: fails (also with CI set in the environment)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
code=0
bash tools/setup_k2_ci_env.sh "$@" || code=$?
if [ "$code" -eq 77 ]; then exit 0; fi
if [ "$code" -ne 0 ]; then exit "$code"; fi
venv=${VENV_K2:-.venv-k2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD
"$venv/bin/python" -m pytest -m k2 tests/lattice/test_k2.py tests/lattice/test_k2_transducer.py tests/lattice/test_lattices.py tests/lattice/test_lattice_beam.py
