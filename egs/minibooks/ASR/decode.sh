#!/usr/bin/env bash
# Tune weights on dev, then decode the test sets by every method: WER, times, one table.
#
#   bash decode.sh                                   # models of exp/pretrained, or else the published ones
#   bash decode.sh --config tiny                     # after prepare.sh and train.sh with --config tiny
#   bash decode.sh --stage 2 --methods nlm-shallow,llm-delayed-shortest --device cuda --world-size 4
#   bash decode.sh --llm DIR --exp-dir exp-llm       # another LLM; --emissions: another acoustic model
#
# Stages: 0 decode dev for tuning (all scores of an N-best list), 1 tune weights (on dev alone) into
# weights.yaml of --exp-dir, 2 decode the test sets, 3 report. --limit N decodes N utterances of each set,
# --confirm N (64; tiny: 4) those of dev that tuning decodes. Every stage can be killed and run again: finished
# utterances are kept. A finished stage leaves a .done mark, which lists its options, and is skipped; with
# other options it runs again, and old results are kept as NAME.1. Remove the mark to run a
# stage again.
#
# Methods are those that the models allow; libriheavy's decode.sh explains the options that name models.
#
# Where k2 is (in this Python, in K2_PYTHON or in .venv-k2), stage 2 adds its rows: graphs (HLG, G) from the
# training text, lattices, weights of their own (weights-k2.yaml). --k2 false or --methods leave them out.
# Exit code 3: done, but some audio was skipped (it is listed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../stages.sh"
. "$here/../../models.sh"
. "$here/../../decoding.sh"
. "$here/../../k2.sh"
corpus=minibooks
dev_set=dev
test_sets="test-clean test-other"
stop_stage=3
published=$here/pretrained
decode_recipe "$@"
