#!/usr/bin/env bash
# Train everything that decoding uses, from what prepare.sh made.
#
#   bash train.sh                                   # all stages, as published
#   bash train.sh --config tiny                     # smoke test: minutes
#   bash train.sh --stage 0 --stop-stage 0 --world-size 4   # acoustic model on 4 GPUs
#
# Stages: 0 acoustic model (CTC-AED), 1 NLM, 2 LLM, 3 matched LLM, 4 export all to --pretrained-dir.
# Every stage can be killed and run again: it goes on from its newest checkpoint. A finished stage leaves
# a .done mark and is skipped; remove the mark to run it again. Options after "--" go to every training.
set -euo pipefail

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }

stage=0
stop_stage=4
config=full
data_dir=
exp_dir=
pretrained_dir=
world_size=1
python=${PYTHON:-python}

here=$(cd "$(dirname "$0")" && pwd)
usage() { sed -n '2,10p' "$here/train.sh" | sed 's/^# \{0,1\}//'; }

while [ $# -gt 0 ]; do
  case "$1" in
    --stage) stage=$2; shift 2 ;;
    --stop-stage) stop_stage=$2; shift 2 ;;
    --config) config=$2; shift 2 ;;
    --data-dir) data_dir=$(absolute "$2"); shift 2 ;;
    --exp-dir) exp_dir=$(absolute "$2"); shift 2 ;;
    --pretrained-dir) pretrained_dir=$(absolute "$2"); shift 2 ;;
    --world-size) world_size=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "train.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done

cd "$here"
conf=conf/$config
[ "$config" = full ] && conf=conf
if [ ! -f "$conf/ctc_aed.yaml" ]; then
  echo "train.sh: --config must be 'full' or a folder of conf/, but is '$config'" >&2
  exit 2
fi
case "$config" in full) suffix= ;; *) suffix=-$config ;; esac
data_dir=${data_dir:-$here/data$suffix}
exp_dir=${exp_dir:-$here/exp$suffix}
# A small configuration must never overwrite the published models.
if [ -z "$pretrained_dir" ]; then
  case "$config" in full) pretrained_dir=pretrained ;; *) pretrained_dir=$exp_dir/pretrained ;; esac
fi
PYTHONPATH="$(cd ../../.. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
mkdir -p "$exp_dir"

log() { echo "$(date '+%F %T') train.sh: $*"; }

icefall_fusion() { # one process, or one a GPU under torchrun
  if [ "$world_size" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc_per_node "$world_size" -m icefall_fusion "$@"
  else
    "$python" -m icefall_fusion "$@"
  fi
}

wanted() { # number, name
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ]; then return 1; fi
  if [ -f "$exp_dir/.$2.done" ]; then log "stage $1 ($2) is done"; return 1; fi
  log "stage $1: $2"
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
  touch "$exp_dir/.ctc_aed.done"
fi
if wanted 1 nlm; then
  train_lm nlm "$data_dir/lang_bpe_500" "$@"
  touch "$exp_dir/.nlm.done"
fi
if wanted 2 llm; then
  train_lm llm "$data_dir/llm_tokenizer" "$@"
  touch "$exp_dir/.llm.done"
fi
if wanted 3 matched_llm; then
  train_lm matched_llm "$data_dir/lang_bpe_500" "$@"
  touch "$exp_dir/.matched_llm.done"
fi
if wanted 4 export; then
  "$python" -m icefall_fusion train --config "$conf/ctc_aed.yaml" --data_dir "$data_dir" \
    --exp "$exp_dir/ctc_aed" --export_to "$pretrained_dir/ctc_aed"
  for name in nlm llm matched_llm; do
    mkdir -p "$pretrained_dir/$name"
    cp "$exp_dir/$name/export/"* "$pretrained_dir/$name/"
  done
  du -sh "$pretrained_dir"/*
  touch "$exp_dir/.export.done"
fi
log "finished"
