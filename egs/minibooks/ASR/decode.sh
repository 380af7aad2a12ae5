#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh                                   # models of exp/pretrained, or else the published ones
#   bash decode.sh --config tiny                     # what prepare.sh and train.sh made with --config tiny
#   bash decode.sh --stage 2 --methods nlm-shallow,llm-delayed-shortest --device cuda --world-size 4
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone), 2 decode the test
# sets, 3 report. Where k2 is (in this Python, in K2_PYTHON or in .venv-k2), stage 2 adds its rows: graphs (HLG, G)
# from the training text, lattices, weights of their own (weights-k2.yaml); it says why not otherwise, and --k2 false,
# or --methods that name others, leave them out. Weights go to weights.yaml in --exp-dir. Every stage can be killed
# and run again: finished utterances are kept. A finished stage leaves a .done mark and is skipped; remove the mark
# (and the outputs) to run it again. --limit N decodes N utterances of each set, --confirm N (64) so many in tuning.
# Exit code 3: done, but some audio was skipped (it is listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
. "$here/../../k2.sh"
corpus=minibooks
dev_set=dev
test_sets="test-clean test-other"
stop_stage=3
with_k2=true

while [ $# -gt 0 ]; do
  decode_option "$@"
  if [ "$taken" -eq 0 ]; then unknown_option "$1"; fi
  shift "$taken"
done

cd "$here"
set_folders
marks=$exp_dir
if [ -z "$pretrained_dir" ]; then # what train.sh made, or else the published models
  pretrained_dir=$exp_dir/pretrained
  if [ "$config" = full ] && [ ! -d "$pretrained_dir" ]; then pretrained_dir=$here/pretrained; fi
fi
log "models of $pretrained_dir"
models=(--emissions.model "$pretrained_dir/ctc_aed" --emissions.device "$device")
for name in nlm llm matched_llm; do
  models+=("--$name.path" "$pretrained_dir/$name")
done
scores=attention-rescoring+nlm-nbest-rescoring+llm-nbest-rescoring+matched-nbest-rescoring
use_ngram
decode_stages "$scores"
exit "$skipped"
