#!/usr/bin/env bash
# kill -9 stages of the LibriHeavy recipe at random moments, run them again, compare with undisturbed runs.
#
#   bash tools/chaos/kill_resume.sh                         # features, training, decoding: 3 kills each
#   bash tools/chaos/kill_resume.sh --trials 20 --stages decode --world-size 2
#   bash tools/chaos/kill_resume.sh --quick true --trials 1 # what continuous integration runs
#   bash tools/chaos/kill_resume.sh --work DIR --seed 7     # DIR keeps all runs and kill_resume.json
#
# The stages run on the stand-in of --config tiny (--download DIR: one that is there), decoding with MiniBooks'
# shipped models. A kill hits all processes of the stage at once. Afterwards must be the same: manifests and
# features, bit by bit; checkpoints, exports, n-gram and loss curves, bit by bit; recognized texts, errors,
# rates and tuned weights, byte by byte, and scores of N-best lists within 0.001 nats.
# Exit code: 0 all the same; 1 something differs or a stage failed; 2 refused. Options: --help.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
case "${1:-}" in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" ;;
esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$root/tools/chaos/kill_resume.py" "$@"
