#!/usr/bin/env bash
# The whole recipe: prepare.sh (data), train.sh (models), decode.sh (tune, decode, report).
#
#   bash run.sh --subset small --llm mistralai/Mistral-7B-v0.1 --device cuda --world-size 8
#   bash run.sh --config tiny          # smoke test on a stand-in: minutes on 2 cores
#   bash run.sh --config standin --books DIR     # 20 h of stand-in, MiniBooks' model sizes: hours on 2 cores
#
# --config, --data-dir and --exp-dir go to all three scripts; --subset, --max-missing, --download and --books
# to prepare.sh; --world-size to train.sh and decode.sh; --llm, --device and --limit to decode.sh. On a
# stand-in the LLM is MiniBooks' shipped one. Every stage can be killed and run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
prepare=()
train=()
decode=()
llm=

while [ $# -gt 0 ]; do
  case "$1" in --stage | --stop-stage) unknown_option "$1" ;; esac # stages belong to the three scripts
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --subset | --max-missing) prepare+=("$1" "$2") ;;
    --download | --books) prepare+=("$1" "$(absolute "$2")") ;;
    --world-size) train+=("$1" "$2") decode+=("$1" "$2") ;;
    --device | --limit) decode+=("$1" "$2") ;;
    --llm) llm=$(path_or_name "$2") ;;
    *) unknown_option "$1" ;;
  esac
  shift 2
done
set_folders
if [ "$config" != full ]; then llm=${llm:-$here/../../minibooks/ASR/pretrained/llm}; fi
if [ -z "$llm" ]; then
  echo "run.sh: --llm must name a language model (see --help)" >&2
  exit 2
fi

folders=(--config "$config" --data-dir "$data_dir")
code=0
bash "$here/prepare.sh" "${folders[@]}" ${prepare[@]+"${prepare[@]}"} || code=$?
if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then exit "$code"; fi
bash "$here/train.sh" "${folders[@]}" --exp-dir "$exp_dir" ${train[@]+"${train[@]}"}
bash "$here/decode.sh" "${folders[@]}" --exp-dir "$exp_dir" --llm "$llm" ${decode[@]+"${decode[@]}"}
exit "$code"
