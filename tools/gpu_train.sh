#!/usr/bin/env bash
# Train MiniBooks' models in the minutes of one GPU machine, bare and without network: speaks a text by eSpeak NG on all
# cores, keeps the features in the GPU's memory, trains the acoustic model by the clock, decodes dev and both test
# sets (greedy and prefix search), and writes models that are small enough to be sent back, with a card.
#
#   bash tools/gpu_train.sh --minutes 9.5 --out DIR --text BOOKS...   # folders, .txt files or tar archives of them
#   bash tools/gpu_train.sh --minutes 5 --out DIR --resume            # goes on: text, speech and checkpoints are kept
#   bash tools/gpu_train.sh --device cpu --minutes 3 --tiny --out DIR # rehearsal on the demo's stories
#
# --out gets ctc_aed/ (a model folder: config.json, bpe.model, weights in files of at most 15 MB), card.json and
# log.jsonl: 6 files. A kill at any moment leaves the export of the last minute there. If minutes are left
# (--lm-share of all; none in calls below 7 minutes), an LLM follows (conf/llm_gpu.yaml): llm.tar.00 and so on,
# pieces of 15 MB, in place of log.jsonl: `cat llm.tar.* | tar x`. SmolLM2, which an adapter could be trained on,
# does not travel: its weights are 98 MB, and 64 MiB can be sent.
#
# Other options: --hours H (most that is spoken), --speak-share S (of the minutes), --compile (torch.compile in the
# background while speech is made), --work DIR (speech, checkpoints). Without --text it takes .gpu/call2/text.
# Dev and test are the recipe's own if the last 20 books of egs/minibooks/ASR/local/books.tsv are among the texts; the
# card says so. PYTHON names a Python with PyTorch (python3). Exit code 0: all is done; 4: the minutes were too few.
# It has never run on a GPU.
set -euo pipefail
GPU_TRAIN_BEGUN=${GPU_TRAIN_BEGUN:-$(date +%s)}
export GPU_TRAIN_BEGUN
cd "$(dirname "$0")/.."
source tools/common.sh
for argument in "$@"; do
  case "$argument" in -h | --help) usage; exit 0 ;; esac
done
python=${PYTHON:-python3}
wheels=(.gpu/wheels/*.whl .gpu/call2/wheels/*.whl)
use_wheels site-train lhotse jsonargparse num2words espeakng_loader
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" tools/gpu/train.py "$@"
