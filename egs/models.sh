# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# What the train.sh and decode.sh of every recipe share. Source it after stages.sh; it runs nothing.

pretrained_dir=
world_size=1
torchrun=--standalone
acoustic=() # further options of the acoustic model's training and export: the recipe's, and of --acoustic
further=()  # what follows "--" on the command line of train.sh: options of every training

# Takes the options that train.sh and decode.sh have in common, and those of all scripts; as common_option.
model_option() {
  common_option "$@"
  if [ "$taken" -gt 0 ]; then return; fi
  case "$1" in
    --pretrained-dir) pretrained_dir=$(absolute "$2") taken=2 ;;
    --world-size) world_size=$(number "$1" "$2") taken=2 ;; # processes on this machine, one a GPU
    --torchrun) torchrun=$2 taken=2 ;;                      # e.g. "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST"
  esac
}

prepare_training() { # the command line of train.sh: takes its options, sets the folders, goes to the recipe's
  while [ $# -gt 0 ]; do
    model_option "$@"
    if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
    case "$1" in
      --) shift; break ;;
      --acoustic) # several options in one word
        if [ $# -lt 2 ]; then unknown_option "$1"; fi
        local words
        read -r -a words <<<"$2"
        acoustic+=("${words[@]}")
        shift 2
        ;;
      *) unknown_option "$1" ;;
    esac
  done
  further=("$@")
  cd "$here" || exit
  set_folders
  marks=$exp_dir
  pretrained_dir=${pretrained_dir:-$exp_dir/pretrained}
  mkdir -p "$exp_dir"
}

find_pieces() { # sets $lang, the folder of the acoustic pieces (as many as prepare.sh made), and $acoustic
  lang=$(find "$data_dir" -maxdepth 1 -name 'lang_bpe_*' | head -n 1)
  if [ -z "$lang" ]; then
    echo "$script: there are no pieces (lang_bpe_*) in $data_dir: run prepare.sh first" >&2
    exit 1
  fi
  acoustic+=(--bpe "$lang" --model.vocab_size "${lang##*_}")
}

launch() { # job, options: one process, or several under torchrun
  if [ "$world_size" -gt 1 ] || [ "$torchrun" != --standalone ]; then
    # shellcheck disable=SC2086 # several options in one word
    "$python" -m torch.distributed.run $torchrun --nproc_per_node "$world_size" -m icefall_fusion "$@"
  else
    "$python" -m icefall_fusion "$@"
  fi
}

train_acoustic() { # with the noise that prepare.sh --noise has left
  local noise=$data_dir/fbank/noise_cuts_noise.jsonl.gz
  if [ -f "$noise" ]; then
    log "noise of $noise is mixed in"
    acoustic+=(--data.noise "$noise")
  fi
  launch train --config "$conf/ctc_aed.yaml" --corpus "$corpus" --data_dir "$data_dir" --exp "$exp_dir/ctc_aed" \
    ${acoustic[@]+"${acoustic[@]}"} ${further[@]+"${further[@]}"}
}

train_lm() { # name, tokenizer folder
  launch train-lm --config "$conf/$1.yaml" --data "$data_dir/lm/$1" --tokenizer "$2" --exp "$exp_dir/$1" \
    ${further[@]+"${further[@]}"}
}

train_ngram() { # name of a stream of pieces, folder of the pieces: the n-gram goes to $pretrained_dir
  job train-ngram --config "$conf/ngram.yaml" --data "$data_dir/lm/$1" --tokens "$2" \
    --out "$pretrained_dir/ngram.arpa.gz"
}

export_models() { # names of language models: they and the averaged acoustic model go to $pretrained_dir
  local name file
  "$python" -m icefall_fusion train --config "$conf/ctc_aed.yaml" --corpus "$corpus" --data_dir "$data_dir" \
    --exp "$exp_dir/ctc_aed" ${acoustic[@]+"${acoustic[@]}"} --export_to "$pretrained_dir/ctc_aed"
  for name in "$@"; do
    mkdir -p "$pretrained_dir/$name"
    for file in "$exp_dir/$name/export/"*; do # a kill never leaves half a file under its final name
      cp "$file" "$pretrained_dir/$name/.new"
      mv "$pretrained_dir/$name/.new" "$pretrained_dir/$name/$(basename "$file")"
    done
  done
  du -sh "$pretrained_dir"/*
}

# --- decoding: dev for tuning, tune, test sets, report ---------------------------------------------------

methods=all
device=cpu
limit=0
confirm=64
with_k2=false  # whether the recipe takes the rows of k2 (egs/k2.sh) where k2 is
models=()      # options of decode that name models, filled by the recipe
llm_options=() # further ones of its LLM
scoring=()     # of how the test sets are scored

decode_option() { # as common_option
  model_option "$@"
  if [ "$taken" -gt 0 ]; then return; fi
  taken=2
  case "$1" in
    --methods) methods=$2 ;;
    --device) device=$2 ;;
    --limit) limit=$(number "$1" "$2") ;;     # decode only so many utterances of each set; 0: all
    --printed-wer) scoring=(--printed_wer "$2") ;;
    --k2) if declare -F k2_stages >/dev/null; then with_k2=$2; else taken=0; fi ;;
    --confirm) confirm=$(number "$1" "$2") ;; # tuning decodes so many utterances of dev; 0: from N-best lists alone
    *) taken=0 ;;
  esac
}

use_ngram() { # adds the n-gram to $models and $scores, if it is there: models of before have none
  if [ -f "$pretrained_dir/ngram.arpa.gz" ]; then
    models+=(--ngram.path "$pretrained_dir/ngram.arpa.gz")
    scores+=+ngram-nbest-rescoring
  else
    log "there is no $pretrained_dir/ngram.arpa.gz (train.sh makes it): methods with an n-gram are left out"
  fi
}

cuts() { echo "$data_dir/fbank/${corpus}_cuts_$1.jsonl.gz"; }

decode_job() { # output folder, options: by all processes; what was skipped is told by exit code or run.json
  local out=$1
  shift
  tolerate_skips launch decode --config "$conf_file" "${models[@]}" --limit "$limit" --out "$out" "$@"
  if ! grep -q '"skipped": \[\]' "$out/run.json"; then skipped=3; fi
}

confirm_in() { # folder, options of decode: sets $confirmation, options of tune, so that it decodes as stage 2 does
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

decode_stages() { # methods that give all scores of an N-best list of dev; $dev_set and $test_sets are set
  local scores=$1 weights=$exp_dir/weights.yaml tuning=$exp_dir/tune sets=() name
  conf_file=$conf/decode.yaml
  [ -f "$conf_file" ] || conf_file=conf/decode.yaml
  mkdir -p "$exp_dir"
  # One search without LM, a wide beam, and every source's score of every hypothesis.
  if wanted 0 tune-decode; then
    decode_job "$tuning" "--test_sets.$dev_set" "$(cuts "$dev_set")" --methods "$scores" --search.beam 20
    finish tune-decode
  fi
  if wanted 1 tune; then
    confirm_in "$tuning" "${models[@]}"
    job tune --nbest "[$tuning/nbest-$dev_set-$scores.jsonl]" --ref "$(cuts "$dev_set")" --methods "$methods" \
      --out "$weights" ${confirmation[@]+"${confirmation[@]}"}
    finish tune
  fi
  if wanted 2 decode; then
    for name in $test_sets; do sets+=("--test_sets.$name" "$(cuts "$name")"); done
    decode_job "$exp_dir/decode" "${sets[@]}" --methods "$methods" --weights "$weights" ${scoring[@]+"${scoring[@]}"}
    finish decode
  fi
  if [ "${with_k2:-false}" = true ]; then k2_stages 2; fi
  if wanted 3 report; then
    job report --runs "[$exp_dir/decode]" --out "$exp_dir/report"
    finish report
  fi
  log "finished: $exp_dir"
}

# All of a decode.sh whose LLM is named and whose other models train.sh made. $llm_options are of decode.
decode_with_llm() { # folder or name of the LLM, of a matched LLM (may be empty)
  local llm=$1 matched_llm=${2:-}
  cd "$here" || exit
  set_folders
  if [ -z "$llm" ]; then
    echo "$script: --llm must name a language model (see --help)" >&2
    exit 2
  fi
  marks=$exp_dir
  pretrained_dir=${pretrained_dir:-$exp_dir/pretrained}
  models=(--emissions.model "$pretrained_dir/ctc_aed" --emissions.device "$device")
  models+=(--nlm.path "$pretrained_dir/nlm" --llm.path "$llm" ${llm_options[@]+"${llm_options[@]}"})
  scores=attention-rescoring+nlm-nbest-rescoring+llm-nbest-rescoring
  use_ngram
  if [ -n "$matched_llm" ]; then
    models+=(--matched_llm.path "$matched_llm")
    scores+=+matched-nbest-rescoring
  fi
  decode_stages "$scores"
  exit "$skipped"
}
