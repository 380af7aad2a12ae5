#!/usr/bin/env bash
# Make all data of the MiniBooks recipe: text, vocabularies, noisy synthetic speech, features, LM text.
#
#   bash prepare.sh --text DIR                # a folder of UTF-8 books, one .txt file each (see below)
#   bash prepare.sh                           # download the books of local/books.tsv (public domain)
#   bash prepare.sh --config tiny             # smoke test: a few minutes of speech, two minutes of work
#   bash prepare.sh --stage 3 --stop-stage 4  # some stages only
#   bash prepare.sh --language es --text DIR  # Spanish books (zh: Mandarin); conf/es has what is its own
#
# A book has one paragraph a line, or lines of up to about 80 characters with blank lines between paragraphs
# (as at Project Gutenberg). That is recognized; Project Gutenberg's header and footer are left out.
#
# Warning: with --text, the split is by the alphabet of the books that are there: the last 12 are for test,
# the 8 before them for dev. The shipped models were trained on the train books of local/books.tsv: where the
# split is another one, its test books may be among those. Train your own models then.
#
# Stages: 0 books to utterances, 1 which of them are spoken, 2 vocabularies, 3 speech, 4 features, 5 LM text.
# Every stage can be killed and run again: finished shards are kept. A finished stage leaves a .done mark in
# --data-dir, which lists its options, and is skipped; with other options it runs again. Remove the mark to
# run it again with the same ones. --config is "full" or a folder of conf/. Exit code 3: done, but some audio
# files were skipped (they are listed). If books could not be downloaded, stage 0 stops: run it again to fetch
# the rest. Speech needs eSpeak NG (GPL-3): pip install espeakng-loader.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
stop_stage=5
text=
workers=2
splits="dev test-clean test-other train"

while [ $# -gt 0 ]; do
  common_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --text) text=$(absolute "$2"); shift 2 ;;
    --workers) workers=$(number "$1" "$2"); shift 2 ;;
    *) unknown_option "$1" ;;
  esac
done

cd "$here"
set_folders
marks=$data_dir
if [ -n "$text" ] && [ ! -d "$text" ]; then
  echo "prepare.sh: --text must be a folder of .txt files, but is '$text'" >&2
  exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the jobs bring their own processes
mkdir -p "$data_dir"

run_job() { # job, options: with the job's file of options where the configuration has one
  local name=$1
  shift
  configs_of "$name"
  job "$name" ${configs[@]+"${configs[@]}"} --data_dir "$data_dir" "$@"
}

find_books() { # sets $text where --text was not given
  if [ -n "$text" ]; then return; fi
  if [ "$config" = tiny ]; then # the stories of the demo, one file each
    text=$data_dir/stories
    demo_books "$text"
  elif [ "$language" != en ]; then
    echo "prepare.sh: --language $language needs --text, a folder of its books" >&2
    exit 2
  else
    text=download/books
    local code=0
    "$python" local/download_books.py --to "$text" || code=$?
    if [ "$code" -eq 3 ]; then # fewer books would be split otherwise
      echo "prepare.sh: some books are missing (see above): the split would not be that of local/books.tsv." \
        "Run prepare.sh again to fetch them, or take those that are there: prepare.sh --text $here/$text" >&2
      exit 1
    fi
    if [ "$code" -ne 0 ]; then exit "$code"; fi
  fi
}

depends text "${text:-the default books}"
if wanted 0 text; then
  find_books
  run_job prepare-text --text "$text" --workers "$workers" ${spoken[@]+"${spoken[@]}"}
  finish text
fi
if wanted 1 select; then
  run_job select-utterances ${spoken[@]+"${spoken[@]}"}
  finish select
fi
if wanted 2 vocabularies; then
  run_job train-tokenizers
  finish vocabularies
fi
if wanted 3 speech; then
  for split in $splits; do
    run_job synthesize --split "$split" --workers "$workers" ${spoken[@]+"${spoken[@]}"}
  done
  finish speech
fi
if wanted 4 features; then
  run_job compute-fbank --workers "$workers"
  finish features
fi
if wanted 5 lm-text; then
  run_job prepare-lm-text --workers "$workers"
  finish lm-text
fi
log "finished: $data_dir"
exit "$skipped"
