#!/usr/bin/env bash
# Build KenLM's lmplz, which estimates n-grams over words, from its sources in the package index. Boost, which it
# needs, comes from a package too (cmeel-boost); only a C++ compiler and cmake have to be there.
#
#   bash tools/build_lmplz.sh          # prints where lmplz is; 2 minutes the first time
#   PYTHON=python3.11 bash tools/build_lmplz.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
kenlm=0.3.0
boost=1.87.0.1 # the last with boost_system, which KenLM asks for
python=${PYTHON:-python3}
work=${LMPLZ_DIR:-$PWD/.cache/lmplz}
done_before() {
  if [ ! -x "$work/build/bin/lmplz" ]; then return; fi
  echo "$work/build/bin/lmplz"
  exit 0
}
done_before
for tool in c++ cmake make; do
  if ! command -v "$tool" >/dev/null; then
    echo "build_lmplz.sh: needs $tool (a C++ compiler, cmake, make)" >&2
    exit 1
  fi
done
mkdir -p "$work"
exec 9>"$work/.lock" # two recipes at once: the second waits; the lock goes with the last process that has it open
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
done_before
quietly "$python" -m pip --disable-pip-version-check download --no-deps --no-binary kenlm -d "$work" "kenlm==$kenlm"
quietly "$python" -m pip --disable-pip-version-check download --no-deps --only-binary :all: -d "$work" \
  "cmeel-boost==$boost"
tar -xzf "$work/kenlm-$kenlm.tar.gz" -C "$work"
"$python" -m zipfile -e "$work"/cmeel_boost-"$boost"*.whl "$work/boost"
quietly cmake -S "$work/kenlm-$kenlm" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  "-DCMAKE_PREFIX_PATH=$work/boost/cmeel.prefix" -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON
quietly cmake --build "$work/build" --target lmplz -- -j "${JOBS:-2}"
echo "$work/build/bin/lmplz"
