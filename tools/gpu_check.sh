#!/usr/bin/env bash
# All that needs a GPU, in one call under 10 minutes: the GPU tests, then every benchmark of tools/bench that
# writes JSON; the results go to one file.
#
#   bash tools/gpu_check.sh               # writes bench/gpu.json
#   bash tools/gpu_check.sh --out DIR
#
# Exit code 0: all passed; 1: something failed (the JSON says what); 3: no GPU here, nothing was checked.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
out=bench
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash tools/setup_env.sh
  python=${VENV:-.venv}/bin/python
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: PyTorch sees no CUDA device here, so nothing was checked" >&2
  exit 3
fi
mkdir -p "$out"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
begun=$(date +%s)
budget=${BUDGET:-570} # seconds for all
left() { echo $((budget - $(date +%s) + begun)); }

results=()
record() { # name, exit code, seconds
  results+=("$1=$2=$3")
  echo "gpu_check.sh: $1: exit code $2 after $3 s"
}
step() { # name, command
  local name=$1 code=0 start
  shift
  start=$(date +%s)
  if [ "$(left)" -le 5 ]; then record "$name" 124 0; return; fi
  timeout "$(left)" "$@" || code=$?
  record "$name" "$code" $(($(date +%s) - start))
}

step tests "$python" -m pytest -m gpu
names=(frame_loop llm_tree search fusion scaling long_audio) # what only a GPU can tell comes first
for bench in tools/bench/*.py; do
  name=$(basename "$bench" .py)
  if [[ " ${names[*]} " != *" $name "* ]]; then names+=("$name"); fi
done
for name in "${names[@]}"; do
  bench=tools/bench/$name.py
  if ! grep -qE -- '"--output"|^    output: str' "$bench"; then continue; fi # others import it
  device=()
  if grep -qE -- '"--device"|^    device: str' "$bench"; then device=(--device cuda); fi
  more=()
  case "$name" in
    fbank) # kaldifeat, where it was installed
      if ! "$python" -c 'import kaldifeat' 2>/dev/null; then
        echo "gpu_check.sh: there is no kaldifeat (tools/install_kaldifeat.sh): features by lhotse alone"
        more=(--backends lhotse)
      fi ;;
    data_pipeline) more=(--cuts 200000) ;; # of the CPU; 5 million take minutes
    search) more=(--batch 128 --beams 10 20 --rounds 3 --budget 3) ;;
    frame_loop) more=(--batches 1 32 128 --beams 10 20 50) ;;
    llm_tree) more=(--dtype bfloat16 --models minibooks open-llama-3b mistral-7b --events 24) ;;
    fusion) more=(--beams 5 10 20 50) ;;
    scaling) more=(--batches 8 32 128) ;;
    long_audio) more=(--minutes 2 10) ;;
  esac
  step "$name" "$python" "$bench" ${device[@]+"${device[@]}"} ${more[@]+"${more[@]}"} --output "$out/gpu-$name.json"
done
step training-libriheavy "$python" tools/bench/training.py --device cuda --seconds 600 \
  --recipe egs/libriheavy/ASR/conf/ctc_aed.yaml --output "$out/gpu-training-libriheavy.json"

"$python" - "$out" "${results[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

from icefall_fusion.files import write_json

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
failed = [name for name, code, _ in steps if code != "0"]
print(f"gpu_check.sh: {out / 'gpu.json'};", f"failed: {failed}" if failed else "all passed")
sys.exit(1 if failed else 0)
PYTHON
