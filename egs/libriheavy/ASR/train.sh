#!/usr/bin/env bash
# Train the acoustic model and the NLM from what prepare.sh made. The LLM is a pre-trained one (decode.sh
# --llm).
#
#   bash train.sh --world-size 8                    # 8 GPUs of this machine
#   bash train.sh --stage 0 --stop-stage 0 --world-size 8 \
#     --torchrun "--nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500"    # the same on each of 8 machines
#   bash train.sh --config tiny                     # smoke test: a minute
#
# Stages: 0 acoustic model (CTC-AED), 1 NLM, 2 n-gram, 3 export all to --pretrained-dir (default: in
# --exp-dir). Every stage can be killed and run again: it goes on from its newest checkpoint, in the middle of
# an epoch. A finished stage leaves a .done mark in --exp-dir, which lists its options, and is skipped. With
# other data or another --acoustic it runs again from the beginning, and the old models are kept as NAME.1; with
# other options after "--" it goes on from its newest checkpoint. Remove the mark to run a stage again. Options
# after "--" go to every training that is run, those of --acoustic "--init MODEL --data.noise_share 0.3" to the
# training and the export of the acoustic model alone. A training that is stopped (Ctrl-C, SIGTERM) writes a checkpoint and
# ends this script with exit code 4.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
corpus=libriheavy
stop_stage=3
prepare_training "$@"
find_pieces

if wanted 0 ctc_aed; then
  train_acoustic
  finish ctc_aed
fi
if wanted 1 nlm; then
  train_lm nlm "$lang"
  finish nlm
fi
if wanted 2 ngram; then
  train_ngram nlm "$lang"
  finish ngram
fi
if wanted 3 export; then
  export_models nlm
  finish export
fi
log "finished"
