#!/usr/bin/env bash
# The whole recipe: prepare.sh (data), train.sh (models), decode.sh (tune, decode, report).
#
#   bash run.sh --text DIR             # hours on a CPU; every stage can be killed and run again
#   bash run.sh --config tiny          # smoke test: 6 minutes on 2 cores
#   bash run.sh --config tiny --language zh  # the same in Mandarin (es: Spanish)
#
# --text, --config, --language, --data-dir, --exp-dir and --device go to the scripts that know them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
text=()
decode=()

while [ $# -gt 0 ]; do
  case "$1" in --stage | --stop-stage) unknown_option "$1" ;; esac # stages belong to the three scripts
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --text) text=(--text "$(absolute "$2")"); shift 2 ;;
    --device) decode+=("$1" "$2"); shift 2 ;;
    *) unknown_option "$1" ;;
  esac
done
set_folders

folders=(--config "$config" --language "$language" --data-dir "$data_dir")
code=0
bash "$here/prepare.sh" "${folders[@]}" ${text[@]+"${text[@]}"} || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then exit "$code"; fi
folders+=(--exp-dir "$exp_dir")
bash "$here/train.sh" "${folders[@]}"
bash "$here/decode.sh" "${folders[@]}" ${decode[@]+"${decode[@]}"}
exit "$code"
