#!/usr/bin/env bash
# build_package.sh BUILD OUT: the Debian package of a finished build, in the folder OUT. What the
# container's build and the package's test run.
set -euo pipefail

if (($# != 2)); then
  echo 'usage: build_package.sh BUILD OUT' >&2
  exit 2
fi
# CPack would make a package without dependencies, and say nothing.
for program in dpkg-shlibdeps file; do
  command -v "$program" >/dev/null || { echo "build_package.sh: $program is missing" >&2; exit 1; }
done
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$1"
cpack -G DEB --config CPackConfig.cmake -B "$out"
rm -rf "$out/_CPack_Packages"
