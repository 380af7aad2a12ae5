#!/usr/bin/env bash
# Make what tools/gpu_day.sh needs on a bare machine with a GPU and no network, check it, print the exact calls.
# To such a machine goes a tree of 64 MiB at most; from it come 8 files of 16 MiB at most.
#
#   bash tools/gpu_pack.sh                  # makes .gpu (git ignores it): wheels, log-probs of the demo's sentences
#   bash tools/gpu_pack.sh --books books.tar.xz   # and the text to train on, for call 2
#   bash tools/gpu_pack.sh --check          # sizes, what wheels need, the calls; without network
#   bash tools/gpu_pack.sh --lean           # before a call: large weights leave git's index; they stay on disk
#   bash tools/gpu_pack.sh --undo           # after it
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash tools/setup_env.sh
  python=${VENV:-.venv}/bin/python
fi
exec "$python" tools/gpu/pack.py "$@"
