#!/usr/bin/env bash
# Find the browsers that test the web page of `python -m icefall_fusion serve`, or install them from Debian's
# packages: Chromium, and Firefox with a sound server without devices (its audio does not start without one).
# Playwright drives them (requirements.txt). Idempotent.
#
#   bash tools/setup_browser.sh              # without a browser tests/serve/test_web_*.py are skipped
#   bash tools/setup_browser.sh --required   # fail if there is no Chromium then
#
# Variables: CHROMIUM, FIREFOX: browsers to take instead.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/common.sh
required=no
for option in "$@"; do
  case "$option" in
    --required) required=yes ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup_browser.sh: unknown option $option (see --help)" >&2; exit 2 ;;
  esac
done
say() { echo "setup_browser.sh: $*"; }

found() { # the first of these programs that is there
  local name
  for name in "$@"; do
    if command -v "$name"; then return; fi
  done
  return 1
}
install() { # Debian's packages, as root
  local as=()
  command -v apt-get >/dev/null || { say "no apt-get here: install $* by hand" >&2; return 1; }
  if [ "$(id -u)" -ne 0 ]; then as=(sudo -n); fi
  quietly "${as[@]}" apt-get update || return 1
  DEBIAN_FRONTEND=noninteractive quietly "${as[@]}" apt-get install -y --no-install-recommends "$@"
}

chromium=(${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome)
firefox=(${FIREFOX:+"$FIREFOX"} firefox-esr firefox)
if ! found "${chromium[@]}" >/dev/null; then install chromium || true; fi
if ! found "${firefox[@]}" >/dev/null; then install firefox-esr || true; fi
if ! found pulseaudio >/dev/null; then install pulseaudio || true; fi
say "Firefox: $(found "${firefox[@]}" || echo none), sound server: $(found pulseaudio || echo none)"
if ! found "${chromium[@]}" >/dev/null; then
  say "no Chromium: the page is not tested in it" >&2
  if [ "$required" = yes ]; then exit 1; fi
else
  say "Chromium: $(found "${chromium[@]}")"
fi
