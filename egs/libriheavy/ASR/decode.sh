#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh --llm mistralai/Mistral-7B-v0.1 --device cuda --world-size 8
#   bash decode.sh --llm openlm-research/open_llama_3b --llm-context pre_text   # earlier text as prompt
#   bash decode.sh --llm ../../minibooks/ASR/pretrained/llm --test-sets "test_clean test_other_large"
#   bash decode.sh --llm DIR --emissions exp/jit_script.pt --emissions-tokens data/lang_bpe_500/bpe.model
#   bash decode.sh --config tiny                     # after prepare.sh and train.sh with --config tiny
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone) into
# weights.yaml of --exp-dir, 2 decode the test sets, 3 report. --limit N decodes N utterances of each set,
# --confirm N (64; tiny: 4) those of dev that tuning decodes. Every stage can be killed and run again, with
# another --world-size too: finished utterances are kept. A finished stage leaves a .done mark, which lists its
# options, and is skipped; with other options it runs again, and old results are kept as NAME.1. Remove the
# mark to run a stage again.
#
# Methods are those that the models allow. --emissions takes the acoustic model of others: our folder, an
# icefall TorchScript file, icefall weights with --emissions-recipe (and --emissions-recipe-options), a
# Hugging Face CTC model or saved log-probs; --emissions-kind says which, where the file does not tell, and
# --emissions-tokens names its bpe.model. LMs over acoustic pieces (NLM, n-gram) are then taken only from a
# --pretrained-dir that is named. --llm: any causal LM of the Hugging Face hub, or a folder. --llm-text says
# how it sees words (as-is, lower, sentence), --llm-quantization 8bit, 4bit or int8, --llm-device-map auto
# spreads it over GPUs. --matched-llm names an LM over the acoustic pieces, for llm-shallow.
#
# Where k2 is (in this Python, in K2_PYTHON or in .venv-k2), stage 2 adds its rows: graphs (HLG, G) from the
# training text, lattices, weights of their own (weights-k2.yaml). --k2 false or --methods leave them out.
# --printed-wer true adds the WER of words with case and punctuation, for models of prepare.sh --text cased.
# Exit code 3: done, but some audio was skipped (it is listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
. "$here/../../decoding.sh"
. "$here/../../k2.sh"
corpus=libriheavy
dev_set=dev
test_sets="test_clean test_other"
stop_stage=3
decode_recipe "$@"
