#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh                                   # models of pretrained/, data of data/
#   bash decode.sh --config tiny                     # what prepare.sh and train.sh made with --config tiny
#   bash decode.sh --stage 2 --methods nlm-shallow,llm-delayed-shortest --device cuda
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone), 2 decode the
# test sets, 3 report. Every stage can be killed and run again: finished utterances are kept. A finished
# stage leaves a .done mark and is skipped; remove the mark (and the outputs) to run it again.
# Exit code 3: done, but some audio was skipped (it is listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
started_in=$PWD
cd "$here"

stage=0
stop_stage=3
config=full
data_dir=data
exp_dir=exp
pretrained_dir=
methods=all
device=cpu
limit=0
confirm=200
python=${PYTHON:-python}

usage() { sed -n '2,11p' "$here/$(basename "$0")" | sed 's/^# \{0,1\}//'; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$started_in/$1" ;; esac; }

while [ $# -gt 0 ]; do
  case "$1" in
    --stage) stage=$2; shift 2 ;;
    --stop-stage) stop_stage=$2; shift 2 ;;
    --config) config=$2; shift 2 ;;
    --data-dir) data_dir=$(absolute "$2"); shift 2 ;;
    --exp-dir) exp_dir=$(absolute "$2"); shift 2 ;;
    --pretrained-dir) pretrained_dir=$(absolute "$2"); shift 2 ;;
    --methods) methods=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;     # decode only so many utterances of each set; 0: all
    --confirm) confirm=$2; shift 2 ;; # tuning decodes so many utterances of dev; 0: from N-best lists alone
    -h | --help) usage; exit 0 ;;
    *) echo "decode.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done

conf=conf/$config/decode.yaml
[ -f "$conf" ] || conf=conf/decode.yaml
if [ -z "$pretrained_dir" ]; then
  case "$config" in full) pretrained_dir=pretrained ;; *) pretrained_dir=$exp_dir/pretrained ;; esac
fi
PYTHONPATH="$(cd ../../.. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
mkdir -p "$exp_dir"
weights=$pretrained_dir/weights.yaml
tuning=$exp_dir/tune

log() { echo "$(date '+%F %T') decode.sh: $*"; }

skipped=0
job() { # exit code 3: done, but some inputs were skipped and listed; it becomes that of this script
  local code=0
  "$python" -m icefall_fusion "$@" || code=$?
  if [ "$code" -eq 3 ]; then skipped=3; log "some audio was skipped, see above"; return 0; fi
  return "$code"
}

wanted() { # number, name
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ]; then return 1; fi
  if [ -f "$exp_dir/.$2.done" ]; then log "stage $1 ($2) is done"; return 1; fi
  log "stage $1: $2"
}

models=(--emissions.model "$pretrained_dir/ctc_aed" --emissions.device "$device")
for name in nlm llm matched_llm; do
  models+=("--$name.path" "$pretrained_dir/$name")
done
cuts() { echo "$data_dir/fbank/minibooks_cuts_$1.jsonl.gz"; }

# One search without LM, a wide beam, and every source's score of every hypothesis.
scores=attention-rescoring+nlm-nbest-rescoring+llm-nbest-rescoring+matched-nbest-rescoring
if wanted 0 tune-decode; then
  job decode --config "$conf" "${models[@]}" --test_sets.dev "$(cuts dev)" --methods "$scores" \
    --search.beam 20 --limit "$limit" --out "$tuning"
  touch "$exp_dir/.tune-decode.done"
fi
if wanted 1 tune; then
  confirmation=() # by decoding with the defaults of the search, those of conf/decode.yaml
  if [ "$confirm" -gt 0 ]; then
    for option in "${models[@]}"; do
      confirmation+=("${option/#--/--confirm.}")
    done
    confirmation+=(--confirm.test_sets "{dev: $(cuts dev)}" --confirm.limit "$confirm")
    confirmation+=(--confirm.out "$tuning")
  fi
  job tune --nbest "[$tuning/nbest-dev-$scores.jsonl]" --ref "$(cuts dev)" --methods "$methods" \
    --out "$weights" ${confirmation[@]+"${confirmation[@]}"}
  touch "$exp_dir/.tune.done"
fi
if wanted 2 decode; then
  job decode --config "$conf" "${models[@]}" --test_sets.test-clean "$(cuts test-clean)" \
    --test_sets.test-other "$(cuts test-other)" --methods "$methods" --weights "$weights" \
    --limit "$limit" --out "$exp_dir/decode"
  touch "$exp_dir/.decode.done"
fi
if wanted 3 report; then
  job report --runs "[$exp_dir/decode]" --out "$exp_dir/report"
  touch "$exp_dir/.report.done"
fi
log "finished: $exp_dir"
exit "$skipped"
