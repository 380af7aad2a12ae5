# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# Stages of a prepare.sh that begins with manifests: pieces, features, LM text. Source it after stages.sh; it
# runs nothing.

pieces=     # acoustic pieces; empty: 500, of the configuration "tiny" 100
bpe=        # SentencePiece model to take the pieces of; empty: they are learned
workers=2
noise=      # folder of noise recordings, which training mixes in; empty: none
backend=lhotse # of the features
features=()    # further options of compute-fbank
share=()       # and those of a machine's share of the work

data_option() { # takes the options of data_stages, and those of all scripts; as common_option
  common_option "$@"
  if [ "$taken" -gt 0 ]; then return; fi
  taken=2
  case "$1" in
    --pieces) pieces=$(number "$1" "$2") ;;
    --workers) workers=$(number "$1" "$2") ;;
    --bpe) bpe=$(absolute "$2") ;;
    --noise) noise=$(absolute "$2") ;;
    --start | --stop) share+=("$1" "$(number "$1" "$2")") ;; # this machine's share of the shards
    --shard-size) features+=(--shard_size "$(number "$1" "$2")") ;; # cuts that a kill may cost each worker
    --backend) backend=$2 ;;
    --device) features+=(--device "$2") ;;
    *) taken=0 ;;
  esac
}

set_data_folders() {
  cd "$here" || exit
  set_folders
  marks=$data_dir
  if [ -z "$pieces" ]; then
    pieces=500
    if [ "$config" = tiny ]; then pieces=100; fi # its text has no more
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the jobs bring their own processes
  mkdir -p "$data_dir"
}

# From $data_dir/manifests/${corpus}_cuts_{train,$dev_set,$test_sets}.jsonl.gz to all that training reads.
data_stages() { # number of the first of three stages: pieces, features, LM text
  local first=$1 split code unfinished=0 before folder
  depends pieces "$pieces $bpe"
  if wanted "$first" pieces; then
    if [ -n "$changed" ]; then
      pieces_folders | while read -r folder; do set_aside "$folder"; done
    fi
    # shellcheck disable=SC2086 # several names
    job export-transcripts --data_dir "$data_dir" --corpus "$corpus" --dev "$dev_set" --held_out $test_sets
    job train-tokenizers --data_dir "$data_dir" --pieces "$pieces" --llm_tokens 0 ${bpe:+--pieces_from "$bpe"}
    finish pieces
  fi
  depends backend "$backend"
  if wanted $((first + 1)) features; then
    for split in $dev_set $test_sets train; do
      code=0
      job compute-fbank --corpus "$corpus" --data_dir "$data_dir" --splits "$split" --workers "$workers" \
        --backend "$backend" --shuffle true ${features[@]+"${features[@]}"} ${share[@]+"${share[@]}"} ||
        code=$?
      if [ "$code" -eq 4 ]; then unfinished=4; elif [ "$code" -ne 0 ]; then exit "$code"; fi
    done
    if [ "$unfinished" -ne 0 ]; then
      log "this machine has done its share; run the same again when the others have done theirs"
      exit "$unfinished"
    fi
    finish features
  fi
  before=$made_from
  depends noise "$noise"
  if [ -n "$noise" ] && wanted $((first + 1)) noise; then
    job noise-cuts --folder "$noise" --data_dir "$data_dir"
    job compute-fbank --corpus noise --data_dir "$data_dir" --splits noise --workers "$workers" \
      --backend "$backend" ${features[@]+"${features[@]}"}
    finish noise
  fi
  made_from=$before # the LM text does not depend on noise
  if wanted $((first + 2)) lm-text; then
    job prepare-lm-text --data_dir "$data_dir" --pieces "$pieces" --streams nlm \
      --spoken_train text/train.jsonl --spoken_dev text/dev.jsonl
    finish lm-text
  fi
}
