#!/usr/bin/env bash
# Make all data of the MiniBooks recipe: text, vocabularies, noisy synthetic speech, features, LM text.
#
#   bash prepare.sh --text DIR                # a folder of UTF-8 books, one .txt file each
#   bash prepare.sh                           # download the books of local/books.tsv (public domain)
#   bash prepare.sh --config tiny             # smoke test: a few minutes of speech, two minutes of work
#   bash prepare.sh --stage 3 --stop-stage 4  # some stages only
#
# Stages: 0 books to utterances, 1 which of them are spoken, 2 vocabularies, 3 speech, 4 features, 5 LM text.
# Every stage can be killed and run again: finished shards are kept. A finished stage leaves a .done mark in
# --data-dir and is skipped; remove the mark to run it again. --config is "full" or a folder of conf/.
# Exit code 3: done, but some books or audio files were skipped (they are listed).
# Speech needs eSpeak NG (GPL-3): pip install espeakng-loader.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
started_in=$PWD
cd "$here"

stage=0
stop_stage=5
config=full
data_dir=data
text=
workers=2
python=${PYTHON:-python}
splits="dev test-clean test-other train"

usage() { sed -n '2,13p' "$here/$(basename "$0")" | sed 's/^# \{0,1\}//'; }
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$started_in/$1" ;; esac; }

while [ $# -gt 0 ]; do
  case "$1" in
    --stage) stage=$2; shift 2 ;;
    --stop-stage) stop_stage=$2; shift 2 ;;
    --config) config=$2; shift 2 ;;
    --data-dir) data_dir=$(absolute "$2"); shift 2 ;;
    --text) text=$(absolute "$2"); shift 2 ;;
    --workers) workers=$2; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "prepare.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done

conf=conf/$config
[ "$config" = full ] && conf=conf
if [ ! -f "$conf/prepare-text.yaml" ]; then
  echo "prepare.sh: --config must be 'full' or a folder of conf/, but is '$config'" >&2
  exit 2
fi
if [ -n "$text" ] && [ ! -d "$text" ]; then
  echo "prepare.sh: --text must be a folder of .txt files, but is '$text'" >&2
  exit 2
fi
PYTHONPATH="$(cd ../../.. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the jobs bring their own processes
mkdir -p "$data_dir"

log() { echo "$(date '+%F %T') prepare.sh: $*"; }

run_job() { # job, options: with the job's file of options where the configuration has one
  local job=$1
  shift
  local options=()
  if [ -f "$conf/$job.yaml" ]; then options=(--config "$conf/$job.yaml"); fi
  tolerate_skips "$python" -m icefall_fusion "$job" ${options[@]+"${options[@]}"} --data_dir "$data_dir" "$@"
}

skipped=0
tolerate_skips() { # exit code 3: done, but some inputs were skipped and listed; it becomes that of this script
  local code=0
  "$@" || code=$?
  if [ "$code" -eq 3 ]; then skipped=3; log "some inputs were skipped, see above"; return 0; fi
  return "$code"
}

wanted() { # number, name
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ]; then return 1; fi
  if [ -f "$data_dir/.$2.done" ]; then log "stage $1 ($2) is done"; return 1; fi
  log "stage $1: $2"
}

find_books() { # sets $text where --text was not given
  if [ -n "$text" ]; then return; fi
  if [ "$config" = tiny ]; then # the stories of the demo, one file each
    text=$data_dir/stories
    mkdir -p "$text"
    awk -v folder="$text" '/^# /{close(file); file=sprintf("%s/story-%d.txt", folder, ++n); next} file{print > file}' \
      ../../../tools/demo/stories.txt
  else
    text=download/books
    tolerate_skips "$python" local/download_books.py --to "$text"
  fi
}

if wanted 0 text; then
  find_books
  run_job prepare-text --text "$text" --workers "$workers"
  touch "$data_dir/.text.done"
fi
if wanted 1 select; then
  run_job select-utterances
  touch "$data_dir/.select.done"
fi
if wanted 2 vocabularies; then
  run_job train-tokenizers
  touch "$data_dir/.vocabularies.done"
fi
if wanted 3 speech; then
  for split in $splits; do
    run_job synthesize --split "$split" --workers "$workers"
  done
  touch "$data_dir/.speech.done"
fi
if wanted 4 features; then
  run_job compute-fbank --workers "$workers"
  touch "$data_dir/.features.done"
fi
if wanted 5 lm-text; then
  run_job prepare-lm-text --workers "$workers"
  touch "$data_dir/.lm-text.done"
fi
log "finished: $data_dir"
exit "$skipped"
