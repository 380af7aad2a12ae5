# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# What the stage scripts of every recipe share. Source it after setting `here` (the recipe's folder); it runs
# nothing. Scripts set `marks` (where .done marks lie), `stage` and `stop_stage` before they call `wanted`.

stage=0
config=full
language=en
overlay=   # folder of what another language than English has of its own in the configuration
spoken=()  # options of jobs that must know such a language
data_dir=
exp_dir=
started_in=$PWD
script=$(basename "$0")
skipped=0
PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

usage() { # the comment at the head of the script
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$here/$script"
}

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$started_in/$1" ;; esac; }

python=${PYTHON:-python}
case "$python" in */*) python=$(absolute "$python") ;; esac # scripts go to their own folder

path_or_name() { if [ -e "$1" ]; then absolute "$1"; else echo "$1"; fi; } # a folder, or a name on the hub

log() { echo "$(date '+%F %T') $script: $*"; }

number() { # option, value: the value, if it is one
  case "$2" in "" | *[!0-9]*) echo "$script: $1 must be a number, but is '$2'" >&2; exit 2 ;; esac
  echo "$2"
}

# Takes the options that all scripts know; returns the number of words taken in `taken` (0: not one of them).
common_option() {
  taken=2
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --) taken=0; return ;;
    --*) if [ $# -lt 2 ]; then echo "$script: $1 needs a value (see --help)" >&2; exit 2; fi ;;
  esac
  case "$1" in
    --stage) stage=$(number "$1" "$2") ;;
    --stop-stage) stop_stage=$(number "$1" "$2") ;;
    --config) config=$2 ;;
    --language) language=$2 ;;
    --data-dir) data_dir=$(absolute "$2") ;;
    --exp-dir) exp_dir=$(absolute "$2") ;;
    *) taken=0 ;;
  esac
}

unknown_option() { echo "$script: unknown option $1 (see --help)" >&2; exit 2; }

# Sets `conf` (folder of YAML files), `overlay`, and data_dir and exp_dir where they were not given: each
# configuration and language keeps its own data and models.
set_folders() {
  local suffix=
  conf=conf
  if [ "$config" != full ]; then conf=conf/$config suffix=-$config; fi
  if [ ! -d "$here/$conf" ]; then
    echo "$script: --config must be 'full' or a folder of conf/, but is '$config'" >&2
    exit 2
  fi
  if [ "$language" != en ]; then
    suffix+=-$language spoken=(--language "$language")
    overlay=conf/$language
    if [ "$config" != full ]; then overlay=$conf-$language; fi
    if [ ! -d "$here/$overlay" ]; then
      echo "$script: --language must be 'en' or have a folder $overlay, but is '$language'" >&2
      exit 2
    fi
  fi
  data_dir=${data_dir:-$here/data$suffix}
  exp_dir=${exp_dir:-$here/exp$suffix}
  depends config "$config${overlay:+ $language}"
}

configs_of() { # name: sets `configs`, the options --config of a job: of the configuration, then of the language
  configs=()
  if [ -f "$conf/$1.yaml" ]; then configs+=(--config "$conf/$1.yaml"); fi
  if [ -n "$overlay" ] && [ -f "$overlay/$1.yaml" ]; then configs+=(--config "$overlay/$1.yaml"); fi
}

# --- marks -----------------------------------------------------------------------------------------------
# A finished stage leaves .NAME.done in $marks. The mark lists the options that the stage and those before it
# depend on, one `depends` a line. A stage whose mark lists others runs again.

made_from= # the lines of `depends` so far
changed=   # lines of the earlier run's mark that differ from those of this run; empty for a first run

depends() { # name, values: all later stages of the script depend on them
  made_from+="$1: ${*:2}"$'\n'
}

sum_of() { # file: its checksum, for `depends` on the mark of another script
  if [ -f "$1" ]; then cksum <"$1"; else echo none; fi
}

mark_of() { # name: the mark of the stage's newest run, finished or not; fails when there is none
  if [ -f "$marks/.$1.begun" ]; then echo "$marks/.$1.begun"; return; fi
  [ -f "$marks/.$1.done" ] && echo "$marks/.$1.done"
}

is_done() { # name: whether the stage is finished, with the options of now
  [ ! -f "$marks/.$1.begun" ] && [ -f "$marks/.$1.done" ] &&
    [ "$(cat "$marks/.$1.done")" = "${made_from%$'\n'}" ]
}

other_lines() { # mark: its lines that are not those of now
  local line
  while IFS= read -r line; do
    case $'\n'"$made_from" in *$'\n'"$line"$'\n'*) ;; *) echo "$line" ;; esac
  done <"$1"
}

wanted() { # number, name: whether this stage is to run now; leaves the mark of its beginning
  local mark
  changed=
  if mark=$(mark_of "$2") && [ "$(cat "$mark")" != "${made_from%$'\n'}" ]; then
    changed=$(other_lines "$mark")
    changed=${changed:-options that are not listed}
  fi
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ]; then
    if [ -n "$changed" ]; then # not what later stages of these options would have been made from
      if [ "$stage" -gt "$1" ]; then
        log "stage $1 ($2) is not run again, but was made with: ${changed//$'\n'/; }"
      fi
      depends "$2" "of other options, $(sum_of "$mark")"
    fi
    return 1
  fi
  if is_done "$2"; then log "stage $1 ($2) is done"; return 1; fi
  if [ -n "$changed" ]; then
    log "stage $1: $2, again: it was made with ${changed//$'\n'/; }"
  else
    log "stage $1: $2"
  fi
  mkdir -p "$marks"
  printf '%s' "$made_from" >"$marks/.$2.begun"
}

finish() { # name: leave the stage's mark
  printf '%s' "$made_from" >"$marks/.$1.done"
  rm -f "$marks/.$1.begun"
}

pieces_folders() { # prints those of acoustic pieces, as prepare.sh made them, a line each
  find "$data_dir" -maxdepth 1 -name "lang_bpe_*" ! -name "*.*" 2>/dev/null | sort || true # a dot: set aside
}

pieces_folder() { # prints that of the acoustic pieces; nothing if there is none; two are an error
  local found
  found=$(pieces_folders)
  if [ "$(printf '%s\n' "$found" | wc -l)" -gt 1 ]; then
    echo "$script: there must be one folder of pieces, but there are ${found//$'\n'/ } (rename all but one to NAME.1)" >&2
    return 1
  fi
  if [ -n "$found" ]; then printf '%s\n' "$found"; fi
}

demo_books() { # folder: the demo's stories go there, one book each; of other languages those of local/
  local stories=$here/../../../tools/demo/stories.txt
  if [ "$language" != en ]; then stories=$here/local/stories-$language.txt; fi
  mkdir -p "$1"
  awk -v folder="$1" '/^# /{close(file); file=sprintf("%s/story-%d.txt", folder, ++n); next} file{print > file}' \
    "$stories"
}

set_aside() { # folders or files: rename those that are there to NAME.1, or the next number that is free
  local path number
  for path in "$@"; do
    if [ ! -e "$path" ]; then continue; fi
    number=1
    while [ -e "$path.$number" ]; do number=$((number + 1)); done
    mv "$path" "$path.$number"
    log "$path was made with other options and is now $path.$number"
  done
}

tolerate_skips() { # exit code 3: done, but some inputs were skipped and listed; it becomes that of the script
  local code=0
  "$@" || code=$?
  if [ "$code" -eq 3 ]; then skipped=3; log "some inputs were skipped, see above"; return 0; fi
  return "$code"
}

job() { tolerate_skips "$python" -m icefall_fusion "$@"; }
