#!/usr/bin/env bash
# build_package.sh BUILD OUT: the Debian package of a finished build, in the folder OUT. What the
# container's build and the package's test run.
set -euo pipefail

if (($# != 2)); then
  echo 'usage: build_package.sh BUILD OUT' >&2
  exit 2
fi
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$1"
cpack -G DEB --config CPackConfig.cmake -B "$out"
rm -rf "$out/_CPack_Packages"
