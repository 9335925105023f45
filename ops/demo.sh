#!/usr/bin/env bash
# Shows the whole thing on this machine: builds, starts a two-stage cluster with the bundled model,
# asks a question about a long document over TCP and over HTTP, once with a compressed KV cache and
# once with the full one, checks both answers, shows what each layer kept and where the KV bytes were,
# and stops the cluster. Any wrong answer or leftover is a failure.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stages=2
min_prompt_tokens=6000
ready_seconds=60
answer_seconds=300
stop_seconds=30

usage() {
  cat <<'EOF'
usage: ops/demo.sh [--no-packages] [--help]

Builds Spindle if needed (--no-packages: without looking at system packages) and runs the demo.
EOF
}

setup_options=()
while (($#)); do
  case $1 in
    --no-packages) setup_options+=(--no-packages) ;;
    --help | -h) usage; exit 0 ;;
    *) printf 'demo.sh: unknown option %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

step() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\ndemo: FAILED: %s\n' "$*" >&2
  if [[ -n ${folder:-} && -s $folder/cluster.log ]]; then
    printf -- '--- the last lines of the cluster'"'"'s log\n' >&2
    tail -n 40 "$folder/cluster.log" >&2
  fi
  exit 1
}
now_ms() { date +%s%3N; }

folder=
mpirun_pid=
mark="SPINDLE_DEMO=$$-$(now_ms)"

# Every process of this demo's cluster, also one that has lost its parent.
cluster_pids() {
  local entry
  for entry in /proc/[0-9]*; do
    if tr '\0' '\n' 2>/dev/null <"$entry/environ" | grep -qxF "$mark"; then
      # A zombie has ended and only waits for its parent.
      grep -q '^State:[[:space:]]*Z' "$entry/status" 2>/dev/null || printf '%s\n' "${entry#/proc/}"
    fi
  done 2>/dev/null
}

clean_up() {
  local pid
  trap - EXIT INT TERM HUP
  for pid in $(cluster_pids); do kill -KILL "$pid" 2>/dev/null || true; done
  if [[ -n $mpirun_pid ]]; then wait "$mpirun_pid" 2>/dev/null || true; fi
  if [[ -n $folder ]]; then rm -rf "$folder"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

"$root/ops/setup.sh" "${setup_options[@]}" || fail 'setup failed'
built_ms=$(now_ms)

# GPUs are used when there are any and the build has CUDA; stages that outnumber them share them.
config=mini-cpu.pbtxt
device="this machine's CPU"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if ((gpus > 0)) && grep -q '^CMAKE_CUDA_COMPILER:' "$root/build/CMakeCache.txt"; then
  config=mini-gpu.pbtxt
  device="$gpus GPU(s)"
fi

step "a cluster of $stages stages on $device"
folder=$(mktemp -d "${TMPDIR:-/tmp}/spindle-demo-XXXXXX")
read -r http_port tcp_port < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
url=http://127.0.0.1:$http_port
spindle() {
  local command=$1
  shift
  timeout "$answer_seconds" "$root/build/bin/spindle" "$command" --port "$tcp_port" "$@"
}

as_root=()
if ((EUID == 0)); then as_root=(--allow-run-as-root); fi
launch=(mpirun "${as_root[@]}" --oversubscribe --bind-to none --mca btl "self,vader" -n "$stages"
  "$root/build/bin/spindled" --config "$root/configs/$config"
  --port "$http_port" --set "api.tcp.port=$tcp_port")
printf '%s\n' "${launch[*]}"
env "$mark" "${launch[@]}" >"$folder/cluster.log" 2>&1 </dev/null &
mpirun_pid=$!

deadline=$((SECONDS + ready_seconds))
until curl -sf -o /dev/null --max-time 2 "$url/ready"; do
  kill -0 "$mpirun_pid" 2>/dev/null || fail 'the cluster ended before it was ready'
  ((SECONDS < deadline)) || fail "the cluster was not ready within $ready_seconds s"
  sleep 0.1
done
printf 'ready after %s ms\n' "$(($(now_ms) - built_ms))"

step 'a long document with one fact in it'
"$root/ops/demo/make_document.py" "$folder"
question=$(<"$folder/question.txt")
expected=$(<"$folder/answer.txt")
printf '%s words of public-domain prose; hidden in it: %s\n' "$(wc -w <"$folder/document.txt")" \
  "$(grep -o 'Remember this well[^.]*[.]' "$folder/document.txt")"
printf 'question: %s\n' "$question"

step 'the answer over TCP, with the KV cache compressed to a tenth after the prompt'
spindle chat --file "$folder/document.txt" --message "$question" --max-tokens 16 --temperature 0 \
  --show-usage --show-kv 2>"$folder/tcp-usage.txt" | tee "$folder/tcp-answer.txt" ||
  fail "spindle chat failed: $(<"$folder/tcp-usage.txt")"
printf '\n'
answered_ms=$(now_ms)
cat "$folder/tcp-usage.txt"
[[ $(<"$folder/tcp-answer.txt") == "$expected" ]] || fail "over TCP the answer must be $expected"

step 'the answer over HTTP (OpenAI API), with the full cache'
python3 - "$folder" >"$folder/request.json" <<'EOF'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
document, question = ((folder / f"{name}.txt").read_text() for name in ("document", "question"))
print(json.dumps({
    "model": "spindle-mini", "messages": [{"role": "user", "content": f"{document}\n\n{question}"}],
    "max_tokens": 16, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    "kv_policy": {"profile": "full"}}))
EOF
curl -sSN --max-time "$answer_seconds" "$url/v1/chat/completions" \
  -H 'Content-Type: application/json' --data-binary "@$folder/request.json" |
  "$root/ops/demo/show_stream.py" "$folder/http-answer.txt" "$folder/http-usage.json" ||
  fail 'the request over HTTP failed'
[[ $(<"$folder/http-answer.txt") == "$expected" ]] || fail "over HTTP the answer must be $expected"
prompt_tokens=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["prompt_tokens"])' \
  "$folder/http-usage.json")
printf 'prompt: %s tokens\n' "$prompt_tokens"
[[ $(<"$folder/http-answer.txt") == $(<"$folder/tcp-answer.txt") ]] ||
  fail 'the compressed and the full cache must give the same answer'
((prompt_tokens >= min_prompt_tokens)) || fail "the prompt must have $min_prompt_tokens tokens"

step 'where the KV bytes were'
spindle stats --json >"$folder/stats.json" || fail 'spindle stats failed'
"$root/ops/demo/show_kv.py" <"$folder/stats.json" || fail 'the stages do not report their KV'

step 'a clean stop'
spindle drain || fail 'spindle drain failed'
deadline=$((SECONDS + stop_seconds))
while kill -0 "$mpirun_pid" 2>/dev/null; do
  ((SECONDS < deadline)) || fail "the cluster did not stop within $stop_seconds s"
  sleep 0.1
done
code=0
wait "$mpirun_pid" || code=$?
mpirun_pid=
((code == 0)) || fail "mpirun ended with $code"
left=$(cluster_pids)
[[ -z $left ]] || fail "processes were left: $left"
for port in "$http_port" "$tcp_port"; do
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then fail "port $port is still open"; fi
done
printf 'mpirun ended with 0, no process is left, both ports are closed\n'

printf '\ndemo: OK, %s s from the finished build to the first answer\n' \
  "$(python3 -c "print(f'{($answered_ms - $built_ms) / 1000:.1f}')")"
