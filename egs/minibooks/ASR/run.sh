#!/usr/bin/env bash
# The whole recipe: prepare.sh (data), train.sh (models), decode.sh (tune, decode, report).
#
#   bash run.sh --text DIR             # hours on a CPU; every stage can be killed and run again
#   bash run.sh --config tiny          # smoke test: under 4 minutes on 2 cores
#
# --text, --config, --data-dir, --exp-dir and --device go to the scripts that know them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

usage() { sed -n '2,7p' "$here/$(basename "$0")" | sed 's/^# \{0,1\}//'; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

config=full
data_dir=
exp_dir=
text=()
device=cpu
while [ $# -gt 0 ]; do
  case "$1" in
    --config) config=$2; shift 2 ;;
    --text) text=(--text "$(absolute "$2")"); shift 2 ;;
    --data-dir) data_dir=$(absolute "$2"); shift 2 ;;
    --exp-dir) exp_dir=$(absolute "$2"); shift 2 ;;
    --device) device=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "run.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
# Each configuration keeps its own data and models.
case "$config" in full) suffix= ;; *) suffix=-$config ;; esac
data_dir=${data_dir:-$here/data$suffix}
exp_dir=${exp_dir:-$here/exp$suffix}

code=0
bash "$here/prepare.sh" --config "$config" --data-dir "$data_dir" ${text[@]+"${text[@]}"} || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then exit "$code"; fi
bash "$here/train.sh" --config "$config" --data-dir "$data_dir" --exp-dir "$exp_dir"
bash "$here/decode.sh" --config "$config" --data-dir "$data_dir" --exp-dir "$exp_dir" --device "$device"
exit "$code"
