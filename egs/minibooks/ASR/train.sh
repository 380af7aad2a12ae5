#!/usr/bin/env bash
# Train everything that decoding uses, from what prepare.sh made.
#
#   bash train.sh                                   # all stages, as published
#   bash train.sh --config tiny                     # smoke test: minutes
#   bash train.sh --stage 0 --stop-stage 0 --world-size 4   # acoustic model on 4 GPUs
#   bash train.sh --base Qwen/Qwen2.5-0.5B          # adapt another LLM: folder, GGUF file or hub name
#   bash train.sh --language es                     # Spanish (zh: Mandarin), after prepare.sh with the same
#
# Stages: 0 acoustic model (CTC-AED), 1 NLM, 2 LLM (a LoRA adapter of SmolLM2, from the package that setup_env.sh
# installs; of another language than English a small Llama of its own), 3 matched LLM (the same on the acoustic
# pieces), 4 n-gram, 5 export all to --pretrained-dir (default: pretrained/ in --exp-dir, where decode.sh looks
# first; the published models stay as they are), 6 the acoustic model's own language model, which lodr-shallow
# subtracts.
# Every stage can be killed and run again: it goes on from its newest checkpoint. A finished stage leaves a
# .done mark, which lists its options, and is skipped. With other data or another --acoustic it runs again from
# the beginning, and the old models are kept as NAME.1; with other options after "--" it goes on from its newest
# checkpoint. Remove the mark to run a stage again. Options after "--" go to every training that is run, those of
# --acoustic "--init MODEL ..." to the training and the export of the acoustic model alone. A training that is
# stopped (Ctrl-C, SIGTERM) writes a checkpoint and ends this script with exit code 4.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
corpus=minibooks
stop_stage=6
options=()
base=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --base) base=$(path_or_name "$2"); shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done
prepare_training ${options[@]+"${options[@]}"} "$@"
lang=$(pieces_folder)
lang=${lang:-$data_dir/lang_bpe_500}
if [ "${lang##*_}" != 500 ]; then acoustic+=(--bpe "$lang" --model.vocab_size "${lang##*_}"); fi
acoustic+=(${spoken[@]+"${spoken[@]}"})

if wanted 0 ctc_aed; then
  train_acoustic
  finish ctc_aed
fi
if wanted 1 nlm; then
  train_lm nlm "$lang"
  finish nlm
fi
small=false # SmolLM2 was made for English: another language gets LLMs of its own unless --base names one
if [ "$language" != en ] && [ -z "$base" ]; then small=true; fi
depends base "${base:-that of the configuration}"
if wanted 2 llm; then
  if $small; then train_lm llm "$data_dir/llm_tokenizer" small_llm; else train_adapter llm; fi
  finish llm
fi
if wanted 3 matched_llm; then
  if $small; then train_lm matched_llm "$lang" small_llm; else train_adapter matched_llm --tokenizer "$lang"; fi
  finish matched_llm
fi
if wanted 4 ngram; then
  train_ngram matched_llm "$lang"
  finish ngram
fi
if wanted 5 export; then
  export_models nlm llm matched_llm
  finish export
fi
if [ "$config" = tiny ]; then
  log "stage 6 is left out: a model of so few steps hears no text"
elif wanted 6 internal-lm; then
  estimate_internal_lm 2000
  finish internal-lm
fi
log "finished"
