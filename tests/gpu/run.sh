#!/usr/bin/env bash
# On a machine with GPUs: builds, runs the GPU tests, checks the kernels with compute-sanitizer, runs
# the benchmarks. Writes JSON and logs into a folder; the last line is `N passed, N failed`.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
  cat <<'EOT'
usage: tests/gpu/run.sh [options]

  --steps LIST     of build,test,sanitize,bench (default: all)
  --filter REGEX   only test and benchmark programs with such a name
  --build DIR      build folder (default: build-gpu)
  --prefix DIR     where packages that the system lacks are unpacked (DIR/usr/...)
  --arch LIST      CUDA architectures (default: 90a)
  --out DIR        results (default: BUILD/gpu-results)
  --limit N        seconds a program may take (default: 300)
  --jobs N         compile N files at a time (default: one per core)
  --help           this text
EOT
}

steps=build,test,sanitize,bench
filter=.
build=$root/build-gpu
prefix=
arch=90a
out=
jobs=$(nproc)
limit=300
while (($#)); do
  case $1 in
    --steps) steps=${2:?--steps needs a list}; shift ;;
    --filter) filter=${2:?--filter needs a pattern}; shift ;;
    --build) build=${2:?--build needs a folder}; shift ;;
    --prefix) prefix=${2:?--prefix needs a folder}; shift ;;
    --arch) arch=${2:?--arch needs a list}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --limit) limit=${2:?--limit needs a number}; shift ;;
    --jobs) jobs=${2:?--jobs needs a number}; shift ;;
    --help | -h) usage; exit 0 ;;
    *) printf 'run.sh: unknown option %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
out=${out:-$build/gpu-results}
mkdir -p "$out"

wants() { [[ ,$steps, == *,$1,* ]]; }
say() { printf '\n#### %s (%d s)\n' "$*" "$SECONDS"; }

passed=0
failed=0
skipped=0
note() { # note CODE WHAT
  if (($1 == 0)); then passed=$((passed + 1)); else
    failed=$((failed + 1))
    printf 'FAILED: %s\n' "$2"
  fi
}

n_gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpus.txt"
if ((n_gpus == 0)); then
  echo 'run.sh: there is no GPU on this machine' >&2
  echo '0 passed, 1 failed'
  exit 1
fi

if wants build; then
  say 'configure and build'
  options=()
  if [[ -n $prefix ]]; then
    options+=("-DCMAKE_PREFIX_PATH=$prefix/usr")
    machine=$(uname -m)
    export PKG_CONFIG_PATH=$prefix/usr/lib/$machine-linux-gnu/pkgconfig
    export PKG_CONFIG_SYSROOT_DIR=$prefix
  fi
  cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSPINDLE_CUDA=ON \
    "-DCMAKE_CUDA_ARCHITECTURES=$arch" "${options[@]}" >"$out/configure.log" 2>&1 || {
    tail -n 30 "$out/configure.log"
    echo '0 passed, 1 failed'
    exit 1
  }
  # What does not compile must not keep the rest from being tested.
  ninja -C "$build" -j "$jobs" -k 0 spindle_gpu >"$out/build.log" 2>&1
  code=$?
  note "$code" 'the build'
  if ((code != 0)); then grep -E 'error|FAILED' "$out/build.log" | head -n 40; fi
fi

mapfile -t tests < <(find "$build/tests" -maxdepth 1 -type f -executable -name 'gpu_*' 2>/dev/null |
  sort | grep -E "$filter")

if wants test; then
  for test in "${tests[@]}"; do
    name=$(basename "$test")
    say "$name"
    timeout "$limit" "$test" --gtest_brief=1 >"$out/$name.log" 2>&1
    code=$?
    tail -n 60 "$out/$name.log"
    note "$code" "$name"
    skipped=$((skipped + $(grep -cE '^\[  SKIPPED \] [A-Za-z]' "$out/$name.log")))
  done
fi

if wants sanitize; then
  for tool in memcheck racecheck; do
    for test in "${tests[@]}"; do
      name=$(basename "$test")
      say "$tool $name"
      timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 77 "$test" --gtest_brief=1 \
        >"$out/$tool-$name.log" 2>&1
      code=$?
      tail -n 4 "$out/$tool-$name.log"
      note "$code" "$tool $name"
    done
  done
fi

if wants bench; then
  : >"$out/bench.jsonl"
  printf '{"name": "run", "commit": "%s", "gpu": "%s"}\n' \
    "$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)" \
    "$(head -n 1 "$out/gpus.txt")" >>"$out/bench.jsonl"
  for bench in $(find "$build/bin" -maxdepth 1 -type f -executable -name 'cuda_*_bench' | sort |
    grep -E "$filter"); do
    name=$(basename "$bench")
    say "$name"
    timeout "$limit" "$bench" >>"$out/bench.jsonl" 2>"$out/$name.log"
    code=$?
    tail -n 80 "$out/$name.log"
    note "$code" "$name"
  done
fi

printf '\n'
line="$passed passed, $failed failed"
if ((skipped > 0)); then line+=", $skipped skipped"; fi
printf '%s\n' "$line"
((failed == 0 && passed > 0))
