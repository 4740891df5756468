#!/usr/bin/env bash
# Debian's Chromium and its driver, for tests/report/test_report_page.py. Needs root.
set -euo pipefail
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=120 update -qq
apt-get -o DPkg::Lock::Timeout=120 install -y -qq --no-install-recommends chromium chromium-driver
