#!/usr/bin/env bash
# Make all data of the LibriHeavy recipe: audio, manifests, features, pieces, LM text.
#
#   bash prepare.sh --subset medium        # the training set: small, medium or large; downloads it if needed
#   bash prepare.sh --subset large --stage 3 --stop-stage 3 --start 0 --stop 500    # a share of the features
#   bash prepare.sh --config tiny                      # smoke test, on a stand-in that it makes itself
#   bash prepare.sh --config standin --books DIR       # 20 h of stand-in, from a folder of UTF-8 books
#
# Stages: 0 download, 1 manifests (text as --text says: upper, lower or cased), 2 pieces (BPE), 3 features of
# dev, the test sets and train, 4 LM text of the NLM (training transcripts without the books of dev and test).
# Every stage can be killed and run again: finished shards are kept. A finished stage leaves a .done mark in
# --data-dir, which lists its options, and is skipped; with other options it runs again. Remove the mark to
# run it again with the same ones. --config is "full" or a folder of conf/.
#
# The audio of dev and of the test sets is in all three parts of Libri-Light. Stage 1 refuses an evaluation
# set that lacks the audio of more than --max-missing (0.005) of its cuts, and names the part to download.
#
# --bpe FILE takes the pieces of another model, with which train.sh can then begin (--acoustic "--init
# MODEL"). --noise DIR (e.g. MUSAN's folder; its speech is left out) makes features of noise, which train.sh
# then mixes in; --musan yes fetches MUSAN (11 GB) for that. --backend kaldifeat --device cuda computes
# features on a GPU (tools/install_kaldifeat.sh), and --workers threads read the audio.
#
# Exit code 3: done, but some inputs were skipped (they are listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../data.sh"
corpus=libriheavy
dev_set=dev
stop_stage=4
download=$here/download
subset=small
form=lower
books=
musan=no
max_missing=0.005

while [ $# -gt 0 ]; do
  data_option "$@"
  if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
  case "$1" in
    --download) download=$(absolute "$2") ;;
    --subset) subset=$2 ;;
    --text) form=$2 ;;
    --musan) musan=$2 ;;
    --max-missing) max_missing=$2 ;;
    --books) books=$(absolute "$2") ;;
    *) unknown_option "$1" ;;
  esac
  shift 2
done

case "$subset" in
  small) parts="small" ;;
  medium) parts="small medium" ;;
  large) parts="small medium large" ;;
  *) echo "prepare.sh: --subset must be small, medium or large, but is '$subset'" >&2; exit 2 ;;
esac
case "$musan" in
  no) ;;
  yes)
    if [ "$config" != full ]; then
      echo "prepare.sh: --musan yes is for the corpus itself; for --config $config give --noise DIR" >&2
      exit 2
    fi
    noise=$download/musan
    ;;
  *) echo "prepare.sh: --musan must be yes or no, but is '$musan'" >&2; exit 2 ;;
esac
set_data_folders
test_sets="test_clean test_other"
if [ "$config" = full ]; then test_sets="$test_sets test_clean_large test_other_large"; fi

stand_in() { # a corpus of other configurations than "full": conf/*/librilike.yaml says how large
  local stories=$data_dir/stories
  if [ -z "$books" ]; then # the demo's stories, one book each
    if [ "$config" != tiny ]; then
      echo "prepare.sh: --config $config needs --books, a folder of UTF-8 books, one .txt file each" >&2
      exit 2
    fi
    books=$stories
    demo_books "$stories"
  fi
  "$python" ../../../tools/make_librilike.py --config "$conf/librilike.yaml" --text "$books" --out "$download" \
    --workers "$workers"
}

depends subset "$subset of $download${books:+, books of $books}"
if wanted 0 download; then
  if [ "$config" = full ]; then
    bash local/download.sh --to "$download" --subset "$subset" --musan "$musan"
  else
    stand_in
  fi
  finish download
fi
if [ "$musan" = yes ] && [ "$stage" -le 0 ] && [ ! -f "$download/.musan.unpacked" ]; then
  bash local/download.sh --to "$download" --subset "$subset" --musan yes # what is there stays
fi
depends text "$form"
depends max_missing "$max_missing"
if wanted 1 manifests; then
  cuts_of() {
    tolerate_skips "$python" local/libriheavy_cuts.py --download "$download" --data_dir "$data_dir" --text "$form" "$@"
  }
  # shellcheck disable=SC2086 # several names
  cuts_of --subsets dev $test_sets --check_audio true --max_missing "$max_missing"
  # shellcheck disable=SC2086
  cuts_of --subsets $parts --split train --pre_text false --min_duration 1 --max_duration 30
  finish manifests
fi
data_stages 2
log "finished: $data_dir"
exit "$skipped"
