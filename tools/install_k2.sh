#!/usr/bin/env bash
# Print (and with --yes run) the pip line that installs the k2 for the torch, CUDA and Python of the active
# environment, from k2's own page of wheels; then check that it works.
#
#   bash tools/install_k2.sh                     # print the line
#   bash tools/install_k2.sh --yes               # run it, import k2, intersect a tiny graph
#   bash tools/install_k2.sh --version 1.24.4.dev20260423   # another k2 than the newest that fits
#   PYTHON=.venv/bin/python bash tools/install_k2.sh --yes
#
# Never "pip install k2": the package index has one old binary for Python 3.9 and torch 1.13.1, which pip installs
# anywhere. For tests alone that one does: tools/setup_k2_ci_env.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
yes=
version=
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --yes) yes=true; shift ;;
    --version) version=${2:?--version needs a value}; shift 2 ;;
    *) echo "install_k2.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -n "${VIRTUAL_ENV:-}" ]; then python=$VIRTUAL_ENV/bin/python
  elif [ -x .venv/bin/python ]; then python=.venv/bin/python
  else python=python3; fi
fi
if ! found=$("$python" -c '
import sys, torch
print(torch.__version__.split("+")[0], torch.version.cuda or "cpu", "cp%d%d" % sys.version_info[:2])' 2>/dev/null); then
  echo "install_k2.sh: $python has no torch: install torch first (bash tools/setup_env.sh); a wheel of k2 fits one torch" >&2
  exit 1
fi
read -r torch cuda tag <<<"$found"
page=https://k2-fsa.github.io/k2/cuda.html
device=cuda
suffix=cuda$cuda.torch$torch
if [ "$cuda" = cpu ]; then
  page=https://k2-fsa.github.io/k2/cpu.html
  device=cpu
  suffix=cpu.torch$torch
fi
echo "install_k2.sh: $python has torch $torch, CUDA $cuda, $tag"
if [ -z "$version" ]; then
  if ! listing=$("$python" -c '
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())' "$page" 2>/dev/null); then
    echo "install_k2.sh: cannot reach $page (no network?). Where it can be reached, find there the newest version" \
      "that ends in +$suffix and has a wheel for $tag, then: bash tools/install_k2.sh --version X --yes" >&2
    exit 1
  fi
  names=$(printf '%s' "$listing" | sed 's/%2B/+/g' | grep -oE "k2-[0-9][0-9.a-z]*\+$suffix-$tag" || true)
  version=$(printf '%s\n' "$names" | sed -E 's/^k2-([^+]*)\+.*/\1/' | sort -V | tail -n 1)
  if [ -z "$version" ]; then
    echo "install_k2.sh: there is no wheel of k2 for +$suffix and $tag at $page. Wheels are exact: take a torch" \
      "of that list (requirements.txt has one), or build k2 from its sources" >&2
    exit 1
  fi
fi
line=("$python" -m pip install "k2==$version+$suffix" -f "$page")
printf '%s\n' "${line[*]}"
if [ -z "$yes" ]; then
  echo "install_k2.sh: add --yes to run it"
  exit 0
fi
if ! "${line[@]}"; then
  echo "install_k2.sh: pip could not install k2 $version+$suffix: is it on $page, and has it $tag?" >&2
  exit 1
fi
"$python" tools/check_k2.py "$device"
