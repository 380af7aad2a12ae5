#!/usr/bin/env bash
# Train everything that decoding uses, from what prepare.sh made.
#
#   bash train.sh                                   # all stages, as published
#   bash train.sh --config tiny                     # smoke test: minutes
#   bash train.sh --stage 0 --stop-stage 0 --world-size 4   # acoustic model on 4 GPUs
#
# Stages: 0 acoustic model (CTC-AED), 1 NLM, 2 LLM, 3 matched LLM, 4 export all to --pretrained-dir (default:
# pretrained/ in --exp-dir, where decode.sh looks first; the published models stay as they are).
# Every stage can be killed and run again: it goes on from its newest checkpoint. A finished stage leaves
# a .done mark and is skipped; remove the mark to run it again. Options after "--" go to every training.
# A training that is stopped (Ctrl-C, SIGTERM) writes a checkpoint and ends this script with exit code 4.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
stop_stage=4
pretrained_dir=
world_size=1

while [ $# -gt 0 ]; do
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --pretrained-dir) pretrained_dir=$(absolute "$2"); shift 2 ;;
    --world-size) world_size=$2; shift 2 ;;
    --) shift; break ;;
    *) unknown_option "$1" ;;
  esac
done

cd "$here"
set_folders
marks=$exp_dir
pretrained_dir=${pretrained_dir:-$exp_dir/pretrained}
mkdir -p "$exp_dir"

icefall_fusion() { # one process, or one a GPU under torchrun
  if [ "$world_size" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc_per_node "$world_size" -m icefall_fusion "$@"
  else
    "$python" -m icefall_fusion "$@"
  fi
}

train_lm() { # name, tokenizer folder, further options
  local name=$1 tokenizer=$2
  shift 2
  icefall_fusion train-lm --config "$conf/$name.yaml" --data "$data_dir/lm/$name" --tokenizer "$tokenizer" \
    --exp "$exp_dir/$name" "$@"
}

if wanted 0 ctc_aed; then
  icefall_fusion train --config "$conf/ctc_aed.yaml" --data_dir "$data_dir" \
    --exp "$exp_dir/ctc_aed" "$@"
  finish ctc_aed
fi
if wanted 1 nlm; then
  train_lm nlm "$data_dir/lang_bpe_500" "$@"
  finish nlm
fi
if wanted 2 llm; then
  train_lm llm "$data_dir/llm_tokenizer" "$@"
  finish llm
fi
if wanted 3 matched_llm; then
  train_lm matched_llm "$data_dir/lang_bpe_500" "$@"
  finish matched_llm
fi
if wanted 4 export; then
  "$python" -m icefall_fusion train --config "$conf/ctc_aed.yaml" --data_dir "$data_dir" \
    --exp "$exp_dir/ctc_aed" --export_to "$pretrained_dir/ctc_aed"
  for name in nlm llm matched_llm; do
    mkdir -p "$pretrained_dir/$name"
    for file in "$exp_dir/$name/export/"*; do # a kill never leaves half a file under its final name
      cp "$file" "$pretrained_dir/$name/.new"
      mv "$pretrained_dir/$name/.new" "$pretrained_dir/$name/$(basename "$file")"
    done
  done
  du -sh "$pretrained_dir"/*
  finish export
fi
log "finished"
