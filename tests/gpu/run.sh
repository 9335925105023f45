#!/usr/bin/env bash
# On a machine with GPUs: builds, runs the GPU tests, checks the kernels with compute-sanitizer, runs
# the benchmarks. Writes JSON and logs into a folder; the last line is `N passed, N failed`.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
  cat <<'EOT'
usage: tests/gpu/run.sh [options]

  --steps LIST     of build,test,sanitize,bench,model,scale,balance,
                   torch,serve,eval (default: all)
  --filter REGEX   only test and benchmark programs with such a name
  --build DIR      build folder (default: build-gpu)
  --prefix DIR     where packages that the system lacks are unpacked (DIR/usr/...)
  --arch LIST      CUDA architectures (default: 90a)
  --out DIR        results (default: BUILD/gpu-results)
  --commit HASH    what is measured (default: the checkout's HEAD)
  --limit N        seconds a program may take (default: 300)
  --jobs N         compile N files at a time (default: one per core)
  --help           this text
EOT
}

steps=build,test,sanitize,bench,model,scale,balance,torch,serve,eval
filter=.
build=$root/build-gpu
prefix=
arch=90a
out=
jobs=$(nproc)
limit=300
commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
while (($#)); do
  case $1 in
    --steps) steps=${2:?--steps needs a list}; shift ;;
    --filter) filter=${2:?--filter needs a pattern}; shift ;;
    --build) build=${2:?--build needs a folder}; shift ;;
    --prefix) prefix=${2:?--prefix needs a folder}; shift ;;
    --arch) arch=${2:?--arch needs a list}; shift ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --commit) commit=${2:?--commit needs a hash}; shift ;;
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
    timeout "$limit" "$test" >"$out/$name.log" 2>&1
    code=$?
    grep -vE '^\[ RUN|^\[       OK|^\[---|^$' "$out/$name.log" | tail -n 60
    note "$code" "$name"
    skipped=$((skipped + $(grep -cE '^\[  SKIPPED \] [A-Za-z].* ms\)$' "$out/$name.log")))
  done
fi

# One program under one tool; some take minutes, so several run at a time.
sanitized() { # sanitized TOOL PROGRAM
  local tool=$1 name code
  name=$(basename "$2")
  # Tests ask for more memory than there is on purpose.
  local api_errors=()
  if [[ $tool == memcheck ]]; then api_errors=(--report-api-errors no); fi
  # Two tests let cuBLASLt's kernels be timed; in a run of these racecheck itself was killed, without
  # a hazard.
  local filter='*'
  if [[ $tool == racecheck && $name == gpu_linear_cuda_test ]]; then
    filter='-*.TunedProductsAreTheSame:*.CanBeCapturedInAGraph'
  fi
  timeout $((3 * limit)) compute-sanitizer --tool "$tool" "${api_errors[@]}" --error-exitcode 77 \
    "$2" --gtest_brief=1 --gtest_filter="$filter" >"$out/$tool-$name.log" 2>&1
  code=$?
  printf '%s %s %s: %s\n' "$code" "$tool" "$name" "$(tail -n 1 "$out/$tool-$name.log")"
}

if wants sanitize; then
  say 'compute-sanitizer on the kernels and what is built of them'
  kernels=()
  for test in "${tests[@]}"; do
    case $(basename "$test") in
      # Whole clusters, and one that needs no GPU.
      gpu_cluster_test | gpu_nccl_test | gpu_sizing_test) ;;
      *) kernels+=("$test") ;;
    esac
  done
  running=0
  : >"$out/sanitize.txt"
  for tool in racecheck memcheck; do
    for test in "${kernels[@]}"; do
      if ((running == 4)); then
        wait -n
        running=$((running - 1))
      fi
      sanitized "$tool" "$test" >>"$out/sanitize.txt" &
      running=$((running + 1))
    done
  done
  wait
  while read -r code what; do
    printf '%s\n' "$what"
    note "$code" "$what"
  done <"$out/sanitize.txt"
fi

if wants bench; then
  : >"$out/bench.jsonl"
  printf '{"name": "run", "commit": "%s", "gpu": "%s"}\n' \
    "$commit" "$(head -n 1 "$out/gpus.txt")" >>"$out/bench.jsonl"
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

as_root=()
if ((EUID == 0)); then as_root=(--allow-run-as-root); fi
launch=(mpirun "${as_root[@]}" --oversubscribe --bind-to none --mca btl "self,vader")

# pipeline NAME RANKS OPTION...: the whole model through the engine.
pipeline() {
  local name=$1 ranks=$2 code=0
  shift 2
  say "pipeline_bench $name, $ranks rank(s)"
  timeout "$limit" "${launch[@]}" -n "$ranks" "$build/bin/pipeline_bench" --device cuda --dummy \
    --kv-bytes 0 --json "$out/pipeline-$name-$ranks.json" "$@" >"$out/pipeline-$name-$ranks.log" 2>&1 || code=$?
  grep -E 'prefill|decode|error|fail|Error' "$out/pipeline-$name-$ranks.log" | tail -n 20
  note "$code" "pipeline_bench $name"
}

if wants model; then
  shapes=$root/models/shapes
  pipeline 8b-short 1 --model "$shapes/llama-3-8b" --max-model-len 8448 --max-num-seqs 32 \
    --max-num-batched-tokens 8192 --prefill-tokens 8192 --prefill-batches 1 --decode-prompt 128 \
    --decode-tokens 96 --decode-batches 1,8,16,32 --repeats 2
  for policy in full spindle; do
    ratio=0
    if [[ $policy == spindle ]]; then ratio=0.25; fi
    pipeline "8b-long-$policy" 1 --model "$shapes/llama-3-8b" --max-model-len 33280 \
      --max-num-seqs 16 --max-num-batched-tokens 8192 --prefill-tokens 32768 --prefill-batches 1 \
      --decode-prompt 32768 --decode-tokens 256 --decode-batches 16 --repeats 1 --mixed-batches 0 \
      --kv-policy "$policy" --kv-ratio "$ratio"
  done
fi

# Saturated: as many requests for each GPU, so that two hold twice as many.
if wants scale; then
  if ((n_gpus < 2)); then
    echo 'skipped: scaling needs two GPUs'
    skipped=$((skipped + 1))
  else
    for ranks in 1 2; do
      pipeline 8b-saturated "$ranks" --model "$root/models/shapes/llama-3-8b" --max-model-len 2304 \
        --max-num-seqs $((128 * ranks)) --max-num-batched-tokens 4096 --prefill-tokens 2048 \
        --prefill-batches $((12 * ranks)) --decode-prompt 1024 --decode-tokens 256 \
        --decode-batches $((128 * ranks)) --repeats 1
    done
    pipeline 8b-saturated-short 2 --model "$root/models/shapes/llama-3-8b" --max-model-len 2304 \
      --max-num-seqs 256 --max-num-batched-tokens 4096 --prefill-batches 0 --mixed-batches 0 \
      --decode-prompt 32 --decode-tokens 256 --decode-batches 256 --repeats 1
    pipeline 1b-saturated 2 --model "$root/models/shapes/llama-3.2-1b" --max-model-len 2304 \
      --max-num-seqs 256 --max-num-batched-tokens 4096 --prefill-batches 0 --mixed-batches 0 \
      --decode-prompt 1024 --decode-tokens 192 --decode-batches 256 --repeats 1
    pipeline 70b-saturated 2 --model "$root/models/shapes/llama-3-70b" --max-model-len 2304 \
      --max-num-seqs 192 --max-num-batched-tokens 4096 --prefill-tokens 2048 --prefill-batches 8 \
      --decode-prompt 1024 --decode-tokens 128 --decode-batches 192 --repeats 1
  fi
fi

# Two stages with KV pools of 3 to 1, which share a GPU where there is only one: requests that run
# together and tokens a second, with balancing off and on. Answers differ in length, so that requests
# do not come and go in waves.
if wants balance; then
  for switch in off on; do
    options=()
    if [[ $switch == on ]]; then options=(--balance --lighter); fi
    code=0
    say "balance_bench $switch"
    timeout "$limit" "${launch[@]}" -n 2 "$build/bin/balance_bench" --device cuda --dummy \
      --model "$root/models/shapes/llama-3-8b" --layers-per-stage 16,16 \
      --kv-bytes 7200000000,2400000000 --max-model-len 6144 --max-num-seqs 160 \
      --max-num-batched-tokens 2048 --min-prompt 3072 --max-prompt 5120 --min-output 256 \
      --output 768 --clients 160 --settle 36 --seconds 40 --json "$out/balance-$switch.json" \
      "${options[@]}" >"$out/balance-$switch.log" 2>&1 || code=$?
    tail -n 3 "$out/balance-$switch.log"
    note "$code" "balance_bench $switch"
  done
fi

if wants torch; then
  say 'PyTorch on the same GPU'
  timeout "$limit" python3 "$root/tests/gpu/torch_baseline.py" --model-decode >"$out/torch.jsonl" \
    2>"$out/torch.log"
  code=$?
  cat "$out/torch.jsonl"
  tail -n 3 "$out/torch.log"
  note "$code" 'the PyTorch baseline'
fi

if wants serve; then
  export SPINDLE_BINARY_DIR=$build SPINDLE_TEST_CONFIG=$root/configs/mini-gpu.pbtxt
  for test in answers lost_rank stop; do
    say "a served cluster: $test"
    (cd "$root/tests/system" && timeout "$limit" python3 "${test}_test.py") >"$out/serve-$test.log" 2>&1
    code=$?
    tail -n 6 "$out/serve-$test.log"
    note "$code" "served cluster: $test"
  done
fi

if wants eval; then
  say 'quality: the same answers as on the CPU'
  profiles=full,spindle,spindlekv,simlayerkv,simlayerkv-int4,snapkv,pyramidkv,streaming,keydiff,defensive,int4,kivi4,kivi2
  timeout "$limit" "$build/bin/spindle" eval --config "$root/configs/mini-gpu.pbtxt" \
    --data "$root/eval/public.jsonl.gz" --profiles "$profiles" --bytes 25,10 --regime qa --limit 30 \
    --concurrency 12 --stages 1 --json "$out/quality-gpu.json" >"$out/eval.log" 2>&1
  code=$?
  tail -n 3 "$out/eval.log"
  if ((code == 0)); then
    "$root/tests/gpu/compare_quality.py" "$root/docs/quality-cpu-30.json" "$out/quality-gpu.json" \
      | tee "$out/quality-compare.txt"
    code=${PIPESTATUS[0]}
  fi
  note "$code" 'quality beside the CPU'
fi

printf '\n'
line="$passed passed, $failed failed"
if ((skipped > 0)); then line+=", $skipped skipped"; fi
printf '%s\n' "$line"
((failed == 0 && passed > 0))
