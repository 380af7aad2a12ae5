# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# What the train.sh of every recipe does: trainings, the n-gram, export; decoding.sh shares its options.
# Source it after stages.sh; it runs nothing.

pretrained_dir=
world_size=1
torchrun=--standalone
acoustic=() # further options of the acoustic model's training and export: the recipe's, and of --acoustic
further=()  # what follows "--" on the command line of train.sh: options of every training, so --stage 1 can have a LM's own

# Takes the options that train.sh and decode.sh have in common, and those of all scripts; as common_option.
model_option() {
  common_option "$@"
  if [ "$taken" -gt 0 ]; then return; fi
  case "$1" in
    --pretrained-dir) pretrained_dir=$(absolute "$2") taken=2 ;;
    --world-size) world_size=$(number "$1" "$2") taken=2 ;; # processes on this machine, one a GPU
    --torchrun) torchrun=$2 taken=2 ;; # e.g. "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST"
  esac
}

prepare_training() { # the command line of train.sh: takes its options, sets the folders, goes to the recipe's
  while [ $# -gt 0 ]; do
    model_option "$@"
    if [ "$taken" -gt 0 ]; then shift "$taken"; continue; fi
    case "$1" in
      --) shift; break ;;
      --acoustic) # several options in one word
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
  local noise=$data_dir/fbank/noise_cuts_noise.jsonl.gz # prepare.sh --noise has left it
  if [ -f "$noise" ]; then
    log "noise of $noise is mixed in"
    acoustic+=(--data.noise "$noise")
  fi
  # the data themselves: prepare.sh may have been called again with options that leave them as they are
  local pieces_dir
  pieces_dir=$(pieces_folder)
  depends data "$(sum_of "$data_dir/fbank/${corpus}_cuts_train.jsonl.gz") $(sum_of "$pieces_dir/bpe.model")"
  depends acoustic ${acoustic[@]+"${acoustic[@]}"}
  depends further ${further[@]+"${further[@]}"}
}

find_pieces() { # sets $lang, the folder of the acoustic pieces, and $acoustic
  lang=$(pieces_folder)
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

# Runs a training in --exp. It ends the script with code 4 when the training was stopped, which leaves a file
# `stopped` there: torchrun turns every code into 1. Models of other data or --acoustic are set aside first.
train_in() { # folder, job, options
  local folder=$1 code=0
  shift
  case "$1 $changed" in
    *data:* | *config:* | *base:* | train\ *acoustic:*) set_aside "$folder" ;;
    *:*) log "it goes on from the newest checkpoint of $folder, if there is one" ;;
  esac
  rm -f "$folder/stopped"
  launch "$@" --exp "$folder" ${further[@]+"${further[@]}"} || code=$?
  if [ -f "$folder/stopped" ]; then log "the training was stopped; run the same again to go on"; exit 4; fi
  if [ "$code" -ne 0 ]; then exit "$code"; fi
}

train_acoustic() {
  configs_of ctc_aed
  train_in "$exp_dir/ctc_aed" train "${configs[@]}" --corpus "$corpus" --data_dir "$data_dir" \
    ${acoustic[@]+"${acoustic[@]}"}
}

train_lm() { # name, tokenizer folder, configuration: a Llama from random weights
  configs_of "${3:-$1}"
  train_in "$exp_dir/$1" train-lm "${configs[@]}" --data "$data_dir/lm/$1" --tokenizer "$2"
}

train_adapter() { # name, options: a LoRA adapter of $base (empty: that of the configuration) on the text
  local name=$1
  shift
  if [ -n "$base" ]; then set -- --base "$base" "$@"; fi
  configs_of "$name"
  train_in "$exp_dir/$name" train-lm "${configs[@]}" --data "$data_dir/text" "$@"
}

train_ngram() { # name of a stream of pieces, folder of the pieces: the n-gram goes to $pretrained_dir
  configs_of ngram
  job train-ngram "${configs[@]}" --data "$data_dir/lm/$1" --tokens "$2" \
    --out "$pretrained_dir/ngram.arpa.gz"
}

put_file() { # file, its place: a kill never leaves half a file under its final name
  local new
  new=$(dirname "$2")/.new
  cp "$1" "$new"
  mv "$new" "$2"
}

estimate_internal_lm() { # utterances: the bigram of what the exported model says of them goes to $pretrained_dir
  job internal-lm --emissions.model "$pretrained_dir/ctc_aed" --limit "$1" --out "$exp_dir/internal-lm" \
    --cuts "$data_dir/fbank/${corpus}_cuts_train.jsonl.gz"
  put_file "$exp_dir/internal-lm/lodr.arpa.gz" "$pretrained_dir/lodr.arpa.gz"
}

export_models() { # names of language models: they and the averaged acoustic model go to $pretrained_dir
  local name file
  configs_of ctc_aed
  "$python" -m icefall_fusion train "${configs[@]}" --corpus "$corpus" --data_dir "$data_dir" \
    --exp "$exp_dir/ctc_aed" ${acoustic[@]+"${acoustic[@]}"} --export_to "$pretrained_dir/ctc_aed"
  for name in "$@"; do
    mkdir -p "$pretrained_dir/$name"
    for file in "$exp_dir/$name/export/"*; do put_file "$file" "$pretrained_dir/$name/$(basename "$file")"; done
  done
  du -sh "$pretrained_dir"/*
}
