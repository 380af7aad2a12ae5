#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh                                   # models of exp/pretrained, or else the published ones
#   bash decode.sh --config tiny                     # what prepare.sh and train.sh made with --config tiny
#   bash decode.sh --stage 2 --methods nlm-shallow,llm-delayed-shortest --device cuda
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone), 2 decode the
# test sets, 3 report. Weights go to weights.yaml in --exp-dir. Every stage can be killed and run again:
# finished utterances are kept. A finished stage leaves a .done mark and is skipped; remove the mark (and the
# outputs) to run it again.
# Exit code 3: done, but some audio was skipped (it is listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
stop_stage=3
pretrained_dir=
methods=all
device=cpu
limit=0
confirm=64

while [ $# -gt 0 ]; do
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --pretrained-dir) pretrained_dir=$(absolute "$2"); shift 2 ;;
    --methods) methods=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;     # decode only so many utterances of each set; 0: all
    --confirm) confirm=$2; shift 2 ;; # tuning decodes so many utterances of dev; 0: from N-best lists alone
    *) unknown_option "$1" ;;
  esac
done

cd "$here"
set_folders
marks=$exp_dir
if [ -z "$pretrained_dir" ]; then # what train.sh made, or else the published models
  pretrained_dir=$exp_dir/pretrained
  if [ "$config" = full ] && [ ! -d "$pretrained_dir" ]; then pretrained_dir=$here/pretrained; fi
fi
log "models of $pretrained_dir"
conf_file=$conf/decode.yaml
[ -f "$conf_file" ] || conf_file=conf/decode.yaml
mkdir -p "$exp_dir"
weights=$exp_dir/weights.yaml
tuning=$exp_dir/tune

models=(--emissions.model "$pretrained_dir/ctc_aed" --emissions.device "$device")
for name in nlm llm matched_llm; do
  models+=("--$name.path" "$pretrained_dir/$name")
done
cuts() { echo "$data_dir/fbank/minibooks_cuts_$1.jsonl.gz"; }

# One search without LM, a wide beam, and every source's score of every hypothesis.
scores=attention-rescoring+nlm-nbest-rescoring+llm-nbest-rescoring+matched-nbest-rescoring
if wanted 0 tune-decode; then
  job decode --config "$conf_file" "${models[@]}" --test_sets.dev "$(cuts dev)" --methods "$scores" \
    --search.beam 20 --limit "$limit" --out "$tuning"
  finish tune-decode
fi
if wanted 1 tune; then
  confirmation=() # by decoding as stage 2 does
  if [ "$confirm" -gt 0 ]; then
    { echo "confirm:"; sed 's/^/  /' "$conf_file"; } >"$tuning/confirm.yaml"
    confirmation=(--config "$tuning/confirm.yaml")
    for option in "${models[@]}"; do
      confirmation+=("${option/#--/--confirm.}")
    done
    confirmation+=(--confirm.test_sets "{dev: $(cuts dev)}" --confirm.limit "$confirm")
    confirmation+=(--confirm.out "$tuning")
  fi
  job tune --nbest "[$tuning/nbest-dev-$scores.jsonl]" --ref "$(cuts dev)" --methods "$methods" \
    --out "$weights" ${confirmation[@]+"${confirmation[@]}"}
  finish tune
fi
if wanted 2 decode; then
  job decode --config "$conf_file" "${models[@]}" --test_sets.test-clean "$(cuts test-clean)" \
    --test_sets.test-other "$(cuts test-other)" --methods "$methods" --weights "$weights" \
    --limit "$limit" --out "$exp_dir/decode"
  finish decode
fi
if wanted 3 report; then
  job report --runs "[$exp_dir/decode]" --out "$exp_dir/report"
  finish report
fi
log "finished: $exp_dir"
exit "$skipped"
