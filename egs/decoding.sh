# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# What the decode.sh of every recipe does: decode dev, tune, decode the test sets, report. Source it after
# stages.sh and models.sh; it runs nothing.

methods=all
device=cpu
limit=0
confirm=          # utterances of dev that tuning decodes; empty: 64, of --config tiny 4
emissions=         # the user's acoustic model; empty: that of $pretrained_dir
emission_options=() # further ones of it: kind K tokens T ...
k2_tokens=         # its bpe.model, where that is not beside it
llm=              # folder or name on the hub; empty: that of $pretrained_dir
matched_llm=      # an LLM over the acoustic pieces; empty: that of $pretrained_dir
llm_options=()    # further options of the LLM
attention=        # whether the acoustic model has an attention decoder
scoring=()        # how the test sets are scored
models=()         # options of decode that name models
with_k2=true      # whether to add the rows of k2, where the recipe sources k2.sh

decode_option() { # as common_option
  model_option "$@"
  if [ "$taken" -gt 0 ]; then return; fi
  taken=2
  case "$1" in
    --methods) methods=$2 ;;
    --device) device=$2 ;;
    --limit) limit=$(number "$1" "$2") ;;     # utterances of each set to decode; 0: all
    --confirm) confirm=$(number "$1" "$2") ;; # 0: tune on N-best lists alone
    --test-sets) test_sets=$2 ;;
    --printed-wer) scoring=(--printed_wer "$2") ;;
    --k2) if declare -F k2_stages >/dev/null; then with_k2=$2; else taken=0; fi ;;
    --emissions) emissions=$(path_or_name "$2") ;;
    --emissions-kind) emission_options+=(kind "$2") ;;
    --emissions-tokens) k2_tokens=$(absolute "$2") emission_options+=(tokens "$k2_tokens") ;;
    --emissions-recipe) emission_options+=(recipe "$(absolute "$2")") ;;
    --emissions-recipe-options) emission_options+=(recipe_options "$2") ;;
    --llm) llm=$(path_or_name "$2") ;;
    --matched-llm) matched_llm=$(path_or_name "$2") ;;
    --llm-text) llm_options+=(--llm.text "$2") ;;
    --llm-boundaries) llm_options+=(--llm.boundaries "$2") ;; # of words without spaces: words, tokens or jieba
    --llm-context) llm_options+=(--llm.context "$2") ;;
    --llm-quantization) llm_options+=(--llm.quantization "$2") ;;
    --llm-device-map) llm_options+=(--llm.device_map "$2") ;;
    *) taken=0 ;;
  esac
}

# All of a decode.sh: takes the options, names the models, runs the stages, ends the script. Set before:
# $corpus, $dev_set, $test_sets, $stop_stage and, if there is one, $published, a folder of models for those who
# have not trained any.
decode_recipe() {
  local given
  while [ $# -gt 0 ]; do
    decode_option "$@"
    if [ "$taken" -eq 0 ]; then unknown_option "$1"; fi
    shift "$taken"
  done
  cd "$here" || exit
  set_folders
  marks=$exp_dir
  given=$pretrained_dir
  pretrained_dir=${pretrained_dir:-$exp_dir/pretrained}
  if [ -z "$given" ] && [ "$config$language" = fullen ] && [ ! -d "$pretrained_dir" ]; then
    pretrained_dir=${published:-$pretrained_dir}
  fi
  log "models of $pretrained_dir"
  name_models "$given"
  decode_stages
  exit "$skipped"
}

# Sets $models and $scores (second passes but that of the attention decoder) from the models that are there.
name_models() { # --pretrained-dir: with --emissions only then its LMs over acoustic pieces are taken
  local i name path option own=yes
  if [ -n "$emissions" ] && [ -z "$1" ]; then own=no; fi
  emissions=${emissions:-$pretrained_dir/ctc_aed}
  if [ -z "$llm" ] && [ -d "$pretrained_dir/llm" ]; then llm=$pretrained_dir/llm; fi
  if [ -z "$llm" ]; then
    echo "$script: --llm must name a language model (see --help)" >&2
    exit 2
  fi
  emission_options=(model "$emissions" ${emission_options[@]+"${emission_options[@]}"})
  models=()
  for ((i = 0; i < ${#emission_options[@]}; i += 2)); do
    models+=("--emissions.${emission_options[i]}" "${emission_options[i + 1]}")
  done
  models+=(--llm.path "$llm" ${llm_options[@]+"${llm_options[@]}"})
  scores="llm-nbest-rescoring"
  path=$pretrained_dir/matched_llm
  if [ -z "$matched_llm" ] && [ "$own" = yes ] && [ -d "$path" ]; then matched_llm=$path; fi
  if [ -n "$matched_llm" ]; then
    models+=(--matched_llm.path "$matched_llm")
    scores+=+matched-nbest-rescoring
  fi
  for name in nlm ngram lodr; do
    case "$name" in
      nlm) path=$pretrained_dir/nlm option=--nlm.path ;;
      ngram) path=$pretrained_dir/ngram.arpa.gz option=--ngram.path ;;
      lodr) path=$pretrained_dir/lodr.arpa.gz option=--lodr ;;
    esac
    if [ "$own" = no ]; then
      log "methods with $name are left out: with --emissions, --pretrained-dir must name LMs over its pieces"
    elif [ -e "$path" ]; then
      models+=("$option" "$path")
      scores+=+$name-nbest-rescoring
    else
      log "methods with $name are left out: there is no $path (train.sh makes it)"
    fi
  done
}

find_attention() { # sets $attention, yes or no: whether the acoustic model, loaded here, has such a decoder
  if [ -n "$attention" ]; then return; fi
  attention=$("$python" -c '
import sys
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.common.unavailable import Unavailable
try:
    options = EmissionOptions(**dict(zip(sys.argv[1::2], sys.argv[2::2])))
    print("no" if open_source(options).model is None else "yes")
except (ValueError, OSError, Unavailable) as error:
    sys.exit(f"error: {error}")' "${emission_options[@]}") || exit 2
  attention=${attention##*$'\n'} # a recipe of icefall may print when it is imported
  if [ "$attention" = yes ]; then
    scores=attention-rescoring+$scores
  else
    log "attention-rescoring is left out: $emissions has no attention decoder"
  fi
}

search_kinds() { # which searches the methods $methods begin with: "ctc", "rnnt" or "ctc rnnt"
  local method
  for method in ${methods//,/ }; do
    case "$method" in rnnt-*) echo rnnt ;; *) echo ctc ;; esac
  done | sort -u | paste -sd " " -
}

name_lists() { # search kinds: sets $lists, the methods whose lists are tuned on: every source's score, no fusion
  lists=()
  case "$1" in *ctc*) lists+=("$scores") ;; esac
  case "$1" in *rnnt*) lists+=("rnnt-$scores") ;; esac
}

cuts() { echo "$data_dir/fbank/${corpus}_cuts_$1.jsonl.gz"; }

decode_job() { # output folder, options: by all processes; what was skipped is told by exit code or run.json
  local out=$1
  shift
  tolerate_skips launch decode --config "$conf_file" "${models[@]}" --limit "$limit" --out "$out" "$@"
  if ! grep -q '"skipped": \[\]' "$out/run.json"; then skipped=3; fi
}

confirm_in() { # folder, options of decode: sets $confirmation, options of tune to decode as stage 2 does
  local folder=$1 option
  shift
  confirmation=()
  if [ "$confirm" -eq 0 ]; then return; fi
  { echo "confirm:"; sed 's/^/  /' "$conf_file"; } >"$folder/confirm.yaml"
  confirmation=(--config "$folder/confirm.yaml")
  for option in "$@"; do confirmation+=("${option/#--/--confirm.}"); done
  confirmation+=(--confirm.test_sets "{$dev_set: $(cuts "$dev_set")}" --confirm.limit "$confirm")
  confirmation+=(--confirm.out "$folder")
}

set_aside_reweighted() { # file of weights: sets those lists in exp/decode aside whose methods are tuned anew
  local path found
  if [ ! -d "$exp_dir/decode" ]; then return; fi
  found=$("$python" -c '
import json, sys
from pathlib import Path
from icefall_fusion.decode.weights import is_tuned, read_weights, weights_of
tuned = read_weights(sys.argv[1])
for path in sorted(Path(sys.argv[2]).glob("nbest-*.jsonl")):
    with path.open(encoding="utf-8") as file:
        options = json.loads(file.readline() or "{}").get("options")
    if options and is_tuned(options["method"], tuned) and options["weights"] != weights_of(options["method"], tuned):
        print(path)' "$1" "$exp_dir/decode") || exit
  while IFS= read -r path; do
    if [ -n "$path" ]; then set_aside "$path"; fi
  done <<<"$found"
}

decode_stages() {
  local weights=$exp_dir/weights.yaml tuning=$exp_dir/tune sets=() files=() name kinds
  kinds=$(search_kinds)
  if [ -z "$confirm" ]; then
    confirm=64
    if [ "$config" = tiny ]; then confirm=4; fi
  fi
  conf_file=$conf/decode.yaml
  [ -f "$conf_file" ] || conf_file=conf/decode.yaml
  mkdir -p "$exp_dir"
  depends data "$data_dir $(sum_of "$data_dir/.features.done")"
  depends training "$(sum_of "$(dirname "$pretrained_dir")/.export.done")"
  depends models "${models[@]}"
  depends limit "$limit"
  if [ "$kinds" != ctc ]; then depends searches "$kinds"; fi
  models+=(--emissions.device "$device")
  # One search of each kind without LM, a wide beam, and every source's score of every hypothesis.
  if wanted 0 tune-decode; then
    if [ -n "$changed" ]; then set_aside "$tuning"; fi
    find_attention
    name_lists "$kinds"
    decode_job "$tuning" "--test_sets.$dev_set" "$(cuts "$dev_set")" --search.beam 20 \
      --methods "$(IFS=,; echo "${lists[*]}")"
    finish tune-decode
  fi
  made_from_models=$made_from # what the graphs of k2 depend on
  depends confirm "$confirm"
  depends methods "$methods"
  if wanted 1 tune; then
    find_attention
    name_lists "$kinds"
    for name in "${lists[@]}"; do files+=("$tuning/nbest-$dev_set-$name.jsonl"); done
    confirm_in "$tuning" "${models[@]}"
    job tune --nbest "[$(IFS=,; echo "${files[*]}")]" --ref "$(cuts "$dev_set")" \
      --methods "$methods" --out "$weights" ${confirmation[@]+"${confirmation[@]}"}
    finish tune
  fi
  depends test_sets "$test_sets"
  depends scoring ${scoring[@]+"${scoring[@]}"}
  if wanted 2 decode; then
    if grep -qvE '^((methods|searches|test_sets|scoring|tune): .*)?$' <<<"$changed"; then # not just other rows
      set_aside "$exp_dir/decode"
    fi
    set_aside_reweighted "$weights"
    for name in $test_sets; do sets+=("--test_sets.$name" "$(cuts "$name")"); done
    decode_job "$exp_dir/decode" "${sets[@]}" --methods "$methods" --weights "$weights" \
      ${scoring[@]+"${scoring[@]}"}
    finish decode
  fi
  if declare -F k2_stages >/dev/null && [ "$with_k2" = true ]; then k2_stages 2; fi
  if wanted 3 report; then
    job report --runs "[$exp_dir/decode]" --out "$exp_dir/report"
    finish report
  fi
  log "finished: $exp_dir"
}
