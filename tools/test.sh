#!/usr/bin/env bash
# Set up the environment, check the style, run all tests that this machine can run.
#
#   bash tools/test.sh                    # everything
#   bash tools/test.sh tests/scoring/test_wer.py  # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
bash tools/setup_env.sh
venv=${VENV:-.venv}
"$venv/bin/ruff" check icefall_fusion tests tools egs
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tiny tensors: more threads only get in each other's way
workers=$(getconf _NPROCESSORS_ONLN)
if [ "$workers" -gt 4 ]; then workers=4; fi # each needs some 2 GB
if [ $# -gt 0 ]; then workers=0; fi         # a few tests: in this process
"$venv/bin/python" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder \
  --durations 20 --durations-min 5 "$@"
