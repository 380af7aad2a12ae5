#!/usr/bin/env bash
# All that needs a GPU, in one call under 10 minutes: the GPU tests, then every benchmark of tools/bench that
# writes JSON; the results go to one file.
#
#   bash tools/gpu_check.sh               # writes bench/gpu.json
#   bash tools/gpu_check.sh --out DIR
#   bash tools/gpu_check.sh --only "tests frame_loop llm_tree fusion-mistral-7b"   # these alone
#   bash tools/gpu_check.sh --list        # prints the commands; needs no GPU
#   bash tools/gpu_check.sh --cuts FILE --emissions DIR   # speech whose log-probs were saved elsewhere
#                           (decode --save_emissions), where there is no eSpeak NG or no acoustic model
#
# PYTHON names a Python that has all packages (no environment is made then); BUDGET seconds for all (570), STEP
# for one thing at most (240): what takes longer is cut off and counts as failed.
# Exit code 0: all passed; 1: something failed (the JSON says what); 3: no GPU here, nothing was checked.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
out=bench
only=""
list=""
speech=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --list) list=1; shift ;;
    --only) only=$2; shift 2 ;;
    --cuts) speech+=(--cuts "$2"); shift 2 ;;
    --emissions) speech+=(--emissions-model "$2"); shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-}
if [ -n "$list" ]; then
  python=${python:-python}
elif [ -z "$python" ]; then
  bash tools/setup_env.sh
  python=${VENV:-.venv}/bin/python
fi
if [ -z "$list" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: PyTorch sees no CUDA device here, so nothing was checked" >&2
  exit 3
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
begun=$(date +%s)
budget=${BUDGET:-570}
left() {
  local seconds=$((budget - $(date +%s) + begun))
  echo $((seconds < ${STEP:-240} ? seconds : ${STEP:-240}))
}
wanted() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }

results=()
record() { # name, exit code, seconds
  results+=("$1=$2=$3")
  echo "gpu_check.sh: $1: exit code $2 after $3 s"
}
step() { # name, command
  local name=$1 code=0 start
  shift
  if ! wanted "$name"; then return; fi
  if [ -n "$list" ]; then echo "$name: $*"; return; fi
  start=$(date +%s)
  if [ "$(left)" -le 5 ]; then record "$name" 124 0; return; fi
  timeout "$(left)" "$@" || code=$?
  record "$name" "$code" $(($(date +%s) - start))
}
bench() { # name of the step, of the benchmark, options
  local name=$1 program=tools/bench/$2.py options=()
  shift 2
  if grep -qE -- '"--device"|^    device: str|speech\.add_arguments' "$program"; then options+=(--device cuda); fi
  if grep -q -- 'speech\.add_arguments' "$program"; then options+=(${speech[@]+"${speech[@]}"}); fi
  step "$name" "$python" "$program" ${options[@]+"${options[@]}"} "$@" --output "$out/gpu-$name.json"
}

if [ -z "$list" ]; then # without them all goes on, by other ways than those to be measured
  "$python" - <<'PYTHON' || { echo "gpu_check.sh: nothing was measured" >&2; exit 1; }
import torch

from icefall_fusion.lm import fused_kernels
from icefall_fusion.common.native_build import load_native

x = torch.randn(2, 64, device="cuda")
out = x.new_empty(2, 32)
fused_kernels.silu_and_multiply[(2, 1)](x, out, 32, BLOCK=1024)
torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :32]) * x[:, 32:])
load_native()
PYTHON
fi
# what only a GPU can tell comes first
bench llm_tree llm_tree --dtype bfloat16 --models minibooks open-llama-3b mistral-7b --first 24
bench fusion-mistral-7b fusion --dtype bfloat16 --shape mistral-7b --methods llm-shallow llm-nbest-rescoring \
  llm-delayed-shortest llm-delayed-interval-16 llm-delayed-interval-64
bench frame_loop frame_loop --batches 1 32 128 --beams 10 20 50
together=() # where it can be had: most of the time kernels are compiled
if [ -z "$list" ] && "$python" -c 'import xdist' 2>/dev/null; then together=(-n 8); fi
step tests "$python" -m pytest -m gpu ${together[@]+"${together[@]}"}
bench search search --batch 128 --beams 10 20 --rounds 3 --budget 3 --leave-out torchaudio "flashlight log_add" \
  "flashlight log_add, 40" "flashlight max" pyctcdecode "ours, mass recovered" # slow on a CPU; has no kernel
bench scaling scaling --batches 8 32 128
bench fusion fusion --beams 5 10 20 50
bench long_audio long_audio --minutes 2 10
for program in tools/bench/*.py; do
  name=$(basename "$program" .py)
  case "$name" in frame_loop | llm_tree | fusion | search | scaling | long_audio) continue ;; esac
  if ! grep -qE -- '"--output"|^    output: str' "$program"; then continue; fi # others import it
  more=()
  case "$name" in
    fbank) # kaldifeat, where it was installed
      if ! "$python" -c 'import kaldifeat' 2>/dev/null; then
        echo "gpu_check.sh: there is no kaldifeat (tools/install_kaldifeat.sh): features by lhotse alone"
        more=(--backends lhotse)
      fi ;;
    data_pipeline) more=(--cuts 200000) ;; # of the CPU; 5 million take minutes
    host) more=(--device cpu) ;; # it watches the host's clock, also while that waits for a GPU
  esac
  bench "$name" "$name" ${more[@]+"${more[@]}"}
done
bench training-libriheavy training --seconds 600 --recipe egs/libriheavy/ASR/conf/ctc_aed.yaml

if [ -n "$list" ]; then exit 0; fi
mkdir -p "$out"
"$python" - "$out" ${results[@]+"${results[@]}"} <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

from icefall_fusion.common.files import write_json

out, steps = Path(sys.argv[1]), [step.split("=") for step in sys.argv[2:]]
checked = {
    "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "steps": {name: {"exit_code": int(code), "seconds": int(seconds)} for name, code, seconds in steps},
}
for name, _, _ in steps:
    path = out / f"gpu-{name}.json"
    if path.exists():
        checked["steps"][name]["result"] = json.loads(path.read_text())
write_json(out / "gpu.json", checked)
if not steps:
    sys.exit("gpu_check.sh: --only names nothing that there is")
failed = [name for name, code, _ in steps if code != "0"]
print(f"gpu_check.sh: {out / 'gpu.json'};", f"failed: {failed}" if failed else "all passed")
sys.exit(1 if failed else 0)
PYTHON
