#!/usr/bin/env bash
# Checks every shell script of the project with shellcheck.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v shellcheck >/dev/null; then
  echo 'shellcheck is not installed'
  exit 77
fi
mapfile -t scripts < <(find . -name .git -prune -o -name node_modules -prune -o -name 'build*' -prune \
  -o -name '*.sh' -print)
scripts+=(.ci/run)
shellcheck "${scripts[@]}"
echo "${#scripts[@]} scripts are clean"
