# shellcheck shell=bash disable=SC2034,SC2154 # variables of who sources it
# The k2 stages of every recipe's decode.sh: graphs, lattices, the methods k2-*. Source it after decoding.sh;
# it runs nothing. k2 is that of $python, else that of $K2_PYTHON or .venv-k2 (tools/setup_k2_ci_env.sh): then
# log-probs go there and lattices come back. With --methods other than all there are no rows of k2.

repo=$(cd "$here/../../.." && pwd)
k2_python=
k2_word_count=8    # words that count less in the training text are not in the lexicon
k2_prune="0,3,6"   # of the trigram in HLG
k2_reprune="0,1,2,3" # of the 4-gram that rescores
k2_ngram=()        # further options of train-word-ngram
k2_paths=100       # random paths of an N-best list

find_k2() { # sets $k2_python to the first Python that has k2; logs why $python has none if there is none
  local candidate reason why=
  for candidate in "$python" "${K2_PYTHON:-}" "$repo/.venv-k2/bin/python"; do
    if [ -z "$candidate" ]; then continue; fi
    if reason=$("$candidate" -c 'from icefall_fusion.lattice.k2_fsas import load_k2; load_k2()' 2>&1); then
      k2_python=$candidate
      log "k2 of $k2_python"
      return 0
    fi
    why=${why:-${reason##*Unavailable: }}
  done
  log "the rows of k2 are left out: $why; or tools/setup_k2_ci_env.sh, for a CPU"
  return 1
}

find_lmplz() { # sets $lmplz; logs why there is none
  if ! lmplz=$(PYTHON=$k2_python bash "$repo/tools/build_lmplz.sh"); then
    log "the rows of k2 are left out: there is no lmplz (see above)"
    return 1
  fi
}

k2_job() { # job, options: where k2 is
  if [ "$k2_python" = "$python" ]; then job "$@"; else "$k2_python" -m icefall_fusion "$@"; fi
}

make_graphs() { # from $data_dir/text/train.jsonl: HLG of a trigram, G of a 4-gram over the same words
  local pieces=$k2_tokens graphs=$exp_dir/graphs
  local ngram=(train-word-ngram --text "$data_dir/text/train.jsonl" --lmplz "$lmplz" --min_count "$k2_word_count")
  mkdir -p "$graphs"
  job "${ngram[@]}" --order 3 --prune "[$k2_prune]" --out "$graphs/3.arpa.gz" ${k2_ngram[@]+"${k2_ngram[@]}"}
  job "${ngram[@]}" --order 4 --prune "[$k2_reprune]" --out "$graphs/4.arpa.gz" ${k2_ngram[@]+"${k2_ngram[@]}"}
  k2_job make-graph --tokens "$pieces" --kind HLG --arpa "$graphs/3.arpa.gz" --out "$graphs/HLG.npz"
  k2_job make-graph --tokens "$pieces" --kind G --arpa "$graphs/4.arpa.gz" --lexicon_arpa "$graphs/3.arpa.gz" \
    --out "$graphs/G.npz"
}

lattices_of() { # test set: sets $k2_options of decode, after making lattices elsewhere if $python has no k2
  local graphs=(--k2.graph "$exp_dir/graphs/HLG.npz" --k2.ngram "$exp_dir/graphs/G.npz" --k2.lattice.paths "$k2_paths")
  if [ "$k2_python" = "$python" ]; then
    k2_options=("${graphs[@]}")
    return
  fi
  local folder=$exp_dir/lattices/$1 saved=$exp_dir/emissions
  if [ "$limit" -gt 0 ]; then folder+=-$limit saved+=-$limit; fi # other utterances, not the first of all
  k2_options=(--k2.saved "$folder")
  if [ ! -f "$folder/.done" ]; then
    rm -rf "${saved:?}/$1"
    decode_job "$exp_dir/emissions-decode" "--test_sets.$1" "$(cuts "$1")" --methods ctc-greedy --restart true \
      --save_emissions "$saved"
    "$k2_python" -m icefall_fusion make-lattices --emissions "$saved/$1" \
      --tokens "$k2_tokens" --out "$folder" "${graphs[@]}"
    touch "$folder/.done"
  fi
}

# Stages of decode.sh between the decoding of the test sets and the report; all have the number of that.
k2_stages() { # number
  local all=k2-nbest-ngram-rescoring whole=k2-whole-lattice-ngram-rescoring weights=$exp_dir/weights-k2.yaml
  local tuning=$exp_dir/tune-k2 given=() name rows=$made_from
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ] || is_done k2-decode; then return; fi
  if [ "$methods" != all ]; then
    log "the rows of k2 are left out: --methods $methods"
    return
  fi
  k2_tokens=${k2_tokens:-$emissions}
  if [ ! -f "$k2_tokens" ] && [ ! -f "$k2_tokens/bpe.model" ]; then
    log "the rows of k2 are left out: there is no bpe.model in $k2_tokens (--emissions-tokens)"
    return
  fi
  if ! find_k2 || ! find_lmplz; then return; fi
  if [ "$config" != full ]; then # little text; an LLM of 135 M parameters reads every path
    k2_word_count=1 k2_prune=0 k2_reprune=0 k2_paths=20
    k2_ngram=(--discount_fallback true)
  fi
  made_from=$made_from_models # other test sets, methods or kinds of scoring leave the graphs as they are
  if wanted "$1" graph; then
    if [ -n "$changed" ]; then
      set_aside "$exp_dir/lattices" "$exp_dir/emissions" "$exp_dir/emissions-decode"
    fi
    make_graphs
    finish graph
  fi
  find_attention
  if [ "$attention" = yes ]; then all+=+attention-rescoring; fi
  all+=+llm-nbest-rescoring
  depends confirm "$confirm"
  if wanted "$1" k2-tune; then
    if [ -n "$changed" ]; then set_aside "$tuning"; fi
    lattices_of "$dev_set"
    decode_job "$tuning" "--test_sets.$dev_set" "$(cuts "$dev_set")" --methods "$all,$whole" "${k2_options[@]}"
    if [ "$confirm" -gt 0 ] && [ "$limit" -gt 0 ]; then limit=$confirm lattices_of "$dev_set"; fi # other utterances
    confirm_in "$tuning" "${models[@]}" "${k2_options[@]}"
    for name in "$all" "$whole"; do given+=("$tuning/nbest-$dev_set-$name.jsonl"); done
    job tune --nbest "${given[@]}" --ref "$(cuts "$dev_set")" --methods k2-all --out "$weights" \
      ${confirmation[@]+"${confirmation[@]}"}
    finish k2-tune
  fi
  made_from=$rows
  if wanted "$1" k2-decode; then
    set_aside_reweighted "$weights"
    for name in $test_sets; do
      lattices_of "$name"
      decode_job "$exp_dir/decode" "--test_sets.$name" "$(cuts "$name")" --methods k2-all --weights "$weights" \
        "${k2_options[@]}"
    done
    finish k2-decode
  fi
}
