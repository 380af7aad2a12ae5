#!/usr/bin/env bash
# One prepared call on a bare machine with a GPU and no network: first a trial of every kernel, then all figures
# (call 1), or training (call 2). Steps and limits: tools/gpu/steps.py; before it: tools/gpu_pack.sh.
#
#   bash tools/gpu_day.sh --call 1 --out DIR     # DIR/gpu.json and DIR/gpu.log; by itself over in 420 s
#   bash tools/gpu_day.sh --call 2 --out DIR --budget 300
#   bash tools/gpu_day.sh --only smoke llm_tree
#   bash tools/gpu_day.sh --list                 # all steps; needs no GPU
#   bash tools/gpu_day.sh --device cpu --out DIR # rehearsal with tiny sizes
#
# PYTHON names a Python with PyTorch (python3); what it lacks is installed from the payload's wheels, if they are
# there, into a folder of its own. Exit code 0: all is well; 1: something is not (the JSON says what); 2: wrong
# options; 3: no GPU here.
set -euo pipefail
GPU_DAY_BEGUN=${GPU_DAY_BEGUN:-$(date +%s)}
export GPU_DAY_BEGUN
cd "$(dirname "$0")/.."
source tools/common.sh
payload=.gpu call=1 last=""
for argument in "$@"; do
  case "$last" in --payload) payload=$argument ;; --call) call=$argument ;; esac
  case "$argument" in -h | --help) usage; exit 0 ;; esac
  last=$argument
done
python=${PYTHON:-python3}
needed=(lhotse kaldialign jsonargparse num2words)
wheels=("$payload"/wheels/*.whl)
if [ "$call" = 2 ]; then needed+=(espeakng_loader) wheels+=("$payload"/call2/wheels/*.whl); fi
use_wheels "site-$call" "${needed[@]}"
exec "$python" tools/gpu/day.py "$@"
