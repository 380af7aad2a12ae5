#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh --llm mistralai/Mistral-7B-v0.1 --device cuda --world-size 8
#   bash decode.sh --llm openlm-research/open_llama_3b --llm-context pre_text   # earlier text as prompt
#   bash decode.sh --llm ../../minibooks/ASR/pretrained/llm --test-sets "test_clean test_other_large"
#   bash decode.sh --config tiny                     # what prepare.sh and train.sh made with --config tiny
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone), 2 decode the test
# sets, 3 report. Where k2 is (in this Python, in K2_PYTHON or in .venv-k2), stage 2 adds its rows: graphs (HLG, G)
# from the training text, lattices, weights of their own (weights-k2.yaml); it says why not otherwise, and --k2 false,
# or --methods that name others, leave them out. Weights go to weights.yaml in --exp-dir. Every stage can be killed
# and run again, with another --world-size too: finished utterances are kept. A finished stage leaves a .done mark and
# is skipped; remove the mark (and the outputs) to run it again. --limit N decodes N utterances of each set, --confirm
# N (64) so many in tuning. --printed-wer true counts words with case and punctuation too, in a column of its own: for
# models of prepare.sh --text cased. Exit code 3: done, but some audio was skipped (it is listed).
#
# --llm: any causal LM of the Hugging Face hub, or a folder. --llm-text says how it sees words (as-is, lower,
# sentence), --llm-quantization 8bit, 4bit or int8, --llm-device-map auto spreads it over GPUs. --matched-llm names an
# LM over the acoustic pieces for llm-shallow, which is left out without it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
. "$here/../../k2.sh"
corpus=libriheavy
dev_set=dev
test_sets="test_clean test_other"
stop_stage=3
with_k2=true
llm=
matched_llm=

while [ $# -gt 0 ]; do
  decode_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --llm) llm=$(path_or_name "$2") ;;
    --llm-text) llm_options+=(--llm.text "$2") ;;
    --llm-context) llm_options+=(--llm.context "$2") ;;
    --llm-quantization) llm_options+=(--llm.quantization "$2") ;;
    --llm-device-map) llm_options+=(--llm.device_map "$2") ;;
    --matched-llm) matched_llm=$(path_or_name "$2") ;;
    --test-sets) test_sets=$2 ;;
    *) unknown_option "$1" ;;
  esac
  shift 2
done

decode_with_llm "$llm" "$matched_llm"
