#!/usr/bin/env bash
# Builds everything, runs the tests and ends with the line `N passed, N failed` (and `, N skipped`
# when any were). Exit code 0 only when tests ran and none failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
usage: ops/test.sh [options]

  --preset NAME          test a preset's build (cpu-debug: ASan + UBSan, cpu-tsan: TSan)
  --label REGEX          only tests with such a label (cpu, system, lint, ...)
  --exclude-label REGEX  no tests with such a label
  --filter REGEX         only tests with such a name
  --parallel N           tests at a time (default 2)
  --no-packages          do not look at or install system packages
  --help                 this text
EOF
}

preset=
parallel=2
setup_options=(--tests)
ctest_options=()
while (($#)); do
  case $1 in
    --preset) preset=${2:?--preset needs a name}; shift ;;
    --label) ctest_options+=(-L "${2:?--label needs a pattern}"); shift ;;
    --exclude-label) ctest_options+=(-LE "${2:?--exclude-label needs a pattern}"); shift ;;
    --filter) ctest_options+=(-R "${2:?--filter needs a pattern}"); shift ;;
    --parallel) parallel=${2:?--parallel needs a number}; shift ;;
    --no-packages) setup_options+=(--no-packages) ;;
    --help | -h) usage; exit 0 ;;
    *) printf 'test.sh: unknown option %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
if [[ -n $preset ]]; then setup_options+=(--preset "$preset"); fi

if ! "$root/ops/setup.sh" "${setup_options[@]}"; then
  echo 'test.sh: setup or build failed, no test ran' >&2
  echo '0 passed, 1 failed'
  exit 1
fi

build=$root/build${preset:+-$preset}
results=$build/test-results.xml
rm -f "$results"
status=0
ctest --test-dir "$build" --parallel "$parallel" --output-on-failure --timeout 1200 \
  --output-junit "$results" "${ctest_options[@]}" || status=$?

# The counts come from the results file, not from the exit code; the two must agree.
/usr/bin/env python3 "$root/ops/test_summary.py" "$results" "$status"
