#!/usr/bin/env bash
# Speak six short stories with unseen voices in noise, decode them by several methods, print WER against speed.
#
#   bash tools/demo.sh                  # ten methods: under 5 minutes on 2 cores after installation
#   bash tools/demo.sh --methods all    # the whole comparison: about three times as long
#   bash tools/demo.sh --quick          # 16 sentences
#   bash tools/demo.sh --quick --methods ctc-greedy,llm-delayed-shortest
#
# Leaves demo/results.json and demo/wer-vs-speed.png. Other options go to "python -m icefall_fusion demo".
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
options=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
    --quick) options+=(--quick true) ;;
    *) options+=("$argument") ;;
  esac
done
bash tools/setup_env.sh
exec "${VENV:-.venv}/bin/python" -m icefall_fusion demo ${options[@]+"${options[@]}"}
