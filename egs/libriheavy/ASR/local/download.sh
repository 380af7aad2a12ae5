#!/usr/bin/env bash
# Fetch Libri-Light's audio and LibriHeavy's manifests; run it again to go on after any interruption.
#
#   bash local/download.sh --to download --subset small    # 509 h, 35 GB (and 1 GB of manifests)
#   bash local/download.sh --to download --subset medium   # small and medium: 5,551 h, 356 GB
#   bash local/download.sh --to download --subset large    # all: 56,345 h, 3.4 TB (6.1 TB while unpacking)
#
# Dev and the test sets are drawn from all three parts: their audio needs --subset large. Files that are there
# are not fetched again: neither a part of which --to/librilight has all recordings that the manifest names,
# nor an archive that is as large as the server's. Of a shorter archive the rest is fetched.
#
# Audio: --to/librilight/SUBSET/SPEAKER/BOOK/CHAPTER.flac; manifests:
# --to/libriheavy/libriheavy_cuts_*.jsonl.gz. Archives are checked against the MD5 sums that Libri-Light
# publishes and removed once they are unpacked (--keep yes keeps them). --musan yes fetches MUSAN too (noise
# and music, 11 GB; no sums are published), to --to/musan. --audio-url, --manifest-url and --musan-url name
# mirrors (also file:///...).
set -euo pipefail
to=download
subset=small
keep=no
musan=no
musan_url=https://www.openslr.org/resources/17
audio_url=https://dl.fbaipublicfiles.com/librilight/data
manifest_url=https://huggingface.co/datasets/pkufool/libriheavy/resolve/main

fail() { echo "download.sh: $1" >&2; exit "${2:-1}"; }

while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
    --to | --subset | --keep | --musan | --audio-url | --manifest-url | --musan-url)
      [ $# -ge 2 ] || fail "$1 needs a value (see --help)" 2
      ;;
    *) fail "unknown option $1 (see --help)" 2 ;;
  esac
  case "$1" in
    --to) to=$2 ;;
    --subset) subset=$2 ;;
    --keep) keep=$2 ;;
    --musan) musan=$2 ;;
    --musan-url) musan_url=$2 ;;
    --audio-url) audio_url=$2 ;;
    --manifest-url) manifest_url=$2 ;;
  esac
  shift 2
done

case "$subset" in # the larger subsets hold the smaller ones
  small) parts="small" ;;
  medium) parts="small medium" ;;
  large) parts="small medium large" ;;
  *) fail "--subset must be small, medium or large, but is '$subset'" 2 ;;
esac

case "$musan" in yes | no) ;; *) fail "--musan must be yes or no, but is '$musan'" 2 ;; esac

md5_of() { # of data_preparation/README.md in facebookresearch/libri-light
  case "$1" in
    small) echo c49207eb86a8e8ac895561c37232041e ;;
    medium) echo c75e7ac62471bfbf2db77528d62a9b74 ;;
    large) echo 4dfbac018f50b99797ece101fc9f0c30 ;;
  esac
}

fetch() { # address, file: goes on where an earlier try ended; the file has its name only when it is whole
  local status=0 answer
  if [ -f "$2" ]; then
    if [ "$(size_of "$2")" -ge "$(size_at "$1")" ]; then return; fi
    echo "$2 is shorter than at the server: the rest is fetched"
    mv "$2" "$2.part"
  fi
  echo "fetching $1"
  mkdir -p "$(dirname "$2")"
  answer=$(get "$1" "$2.part") || status=$?
  if [ "$status" -eq 33 ]; then # the server cannot go on in the middle
    echo "$1: this server sends only whole files, so it begins anew"
    rm "$2.part"
    status=0
    answer=$(get "$1" "$2.part") || status=$?
  fi
  # 416: there is nothing after what is there already. It is checked as any other file is.
  if [ "$status" -ne 0 ] && ! { [ "$answer" = 416 ] && [ -s "$2.part" ]; }; then
    fail "$1 cannot be fetched (see above); run the same command again to go on, or name a mirror (see --help)"
  fi
  mv "$2.part" "$2"
}

size_of() { wc -c <"$1" | tr -d ' '; } # file: bytes

size_at() { # address: bytes, or 0 where the server does not tell
  curl --connect-timeout 10 --silent --fail --location --head "$1" |
    awk 'tolower($1) == "content-length:" { size = $2 + 0 } END { printf "%.0f\n", size }' || true
}

get() { # address, file: appends what is missing; prints the status of HTTP
  curl --connect-timeout 10 --fail --location --retry 5 --continue-at - --output "$2" --write-out '%{http_code}' "$1"
}

for part in $parts dev test_clean test_other test_clean_large test_other_large; do
  name=libriheavy_cuts_$part.jsonl.gz
  fetch "$manifest_url/$name" "$to/libriheavy/$name"
  gzip --test "$to/libriheavy/$name" || {
    rm "$to/libriheavy/$name"
    fail "$manifest_url/$name is no whole gzip file and was removed; run the same command again"
  }
done

lacking() { # part: how many recordings of its manifest are not in --to/librilight, or are empty
  gzip --decompress --stdout "$to/libriheavy/libriheavy_cuts_$1.jsonl.gz" |
    awk 'match($0, /"source": *"[^"]*"/) {
      path = substr($0, RSTART, RLENGTH)
      gsub(/^"source": *"|"$/, "", path)
      if (path != last) print last = path }' |
    while IFS= read -r path; do if [ ! -s "$to/${path#download/}" ]; then echo; fi; done | wc -l | tr -d ' '
}

for part in $parts; do
  mark=$to/librilight/.$part.unpacked
  archive=$to/librilight/$part.tar
  if [ ! -f "$mark" ] && [ ! -f "$archive" ] && [ -d "$to/librilight/$part" ]; then
    number=$(lacking "$part")
    if [ "$number" -eq 0 ]; then touch "$mark"; else echo "$part lacks $number recordings"; fi
  fi
  if [ -f "$mark" ]; then echo "$part is unpacked"; continue; fi
  fetch "$audio_url/$part.tar" "$archive"
  echo "checking $archive"
  sum=$(md5sum "$archive" | cut -d ' ' -f 1)
  if [ "$sum" != "$(md5_of "$part")" ]; then
    mv "$archive" "$archive.wrong"
    fail "$archive must have the MD5 sum $(md5_of "$part"), but has $sum; it is now $part.tar.wrong"
  fi
  tar --extract --file "$archive" --directory "$to/librilight" # over what a kill may have cut short
  touch "$mark"
  if [ "$keep" = no ]; then rm "$archive"; fi
done

if [ "$musan" = yes ] && [ ! -f "$to/.musan.unpacked" ]; then
  fetch "$musan_url/musan.tar.gz" "$to/musan.tar.gz"
  gzip --test "$to/musan.tar.gz" || {
    rm "$to/musan.tar.gz"
    fail "$musan_url/musan.tar.gz is no whole gzip file and was removed; run the same command again"
  }
  tar --extract --gzip --file "$to/musan.tar.gz" --directory "$to"
  touch "$to/.musan.unpacked"
  if [ "$keep" = no ]; then rm "$to/musan.tar.gz"; fi
fi
