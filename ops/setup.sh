#!/usr/bin/env bash
# Installs what is missing and builds Spindle. Run it again at any time: it does only what is left
# to do. `ops/setup.sh --help` lists the options.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'EOF'
usage: ops/setup.sh [options]

Installs the missing packages (Debian 12, Ubuntu 24.04), then configures and builds.
Without options: the programs, optimised, in build/ (binaries in build/bin/), and the chart
library of the dashboard from npm.

  --tests          also build the tests and install what only they use: prometheus, npm packages
  --preset NAME    build a preset of CMakePresets.json in build-NAME/ instead
                   (cpu-debug: ASan + UBSan, cpu-tsan: TSan)
  --no-packages    do not look at or install system packages
  --packages-only  install packages and stop
  --list-packages  print the packages this system needs and stop
  --jobs N         compile N files at a time (default: one per core, fewer when memory is short)
  --help           this text
EOF
}

with_tests=false
packages=true
build=true
list_only=false
preset=
jobs=
while (($#)); do
  case $1 in
    --tests) with_tests=true ;;
    --no-packages) packages=false ;;
    --packages-only) build=false ;;
    --list-packages) list_only=true ;;
    --preset) preset=${2:?--preset needs a name}; shift ;;
    --jobs) jobs=${2:?--jobs needs a number}; shift ;;
    --help | -h) usage; exit 0 ;;
    *) printf 'setup.sh: unknown option %s\n\n' "$1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

common_packages=(
  g++ cmake ninja-build ccache pkg-config ca-certificates curl
  libopenmpi-dev openmpi-bin libssl-dev libprotobuf-dev protobuf-compiler libspdlog-dev
  libcli11-dev prometheus-cpp-dev libpcre2-dev libutf8proc-dev libxxhash-dev libdnnl-dev
  zlib1g-dev libgtest-dev libgmock-dev python3 python3-jinja2 python3-protobuf shellcheck
  dpkg-dev file
)
# With --tests: what tests/ops/deploy installs with, and who reads manual pages and completions.
deploy_test_packages=(
  debootstrap lintian systemd-container iproute2 man-db groff mandoc zsh fish
  python3-yaml python3-jsonschema
)
# Real ones beside a real cluster.
test_packages=(prometheus)

# Sets `system` and `needed`; the only names that differ are Boost's.
choose_packages() {
  local id='' version=''
  if [[ -r /etc/os-release ]]; then
    id=$(sed -n 's/^ID="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' /etc/os-release)
    version=$(sed -n 's/^VERSION_ID="\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' /etc/os-release)
  fi
  system="$id $version"
  needed=("${common_packages[@]}")
  if $with_tests; then needed+=("${deploy_test_packages[@]}" "${test_packages[@]}"); fi
  case $system in
    'debian 12')
      needed+=(libboost1.81-dev)
      # The dashboard's tests. Ubuntu's package is a stub for a snap, so there they need a browser
      # that is there already and are skipped without one.
      if $with_tests; then needed+=(chromium); fi
      ;;
    'ubuntu 24.04') needed+=(libboost1.83-dev) ;;
    *)
      needed+=('libboost-dev (1.81 or newer)' 'nodejs (18 or newer)' npm)
      return 1
      ;;
  esac
}

node_is_there() {
  command -v npm >/dev/null && command -v node >/dev/null &&
    [[ $(node --version) =~ ^v([0-9]+) ]] && ((BASH_REMATCH[1] >= 18))
}

missing_packages() {
  local name
  for name in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null || true) == installed ]] ||
      printf '%s\n' "$name"
  done
}

install_packages() {
  local -a missing
  # A node that does not come from the distribution is as good.
  if ! node_is_there; then needed+=(nodejs npm); fi
  mapfile -t missing < <(missing_packages "${needed[@]}")
  if ((${#missing[@]} == 0)); then
    say "packages: all ${#needed[@]} are installed"
    return
  fi
  local -a as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      fail "needs root to install packages. As root: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "packages: installing ${missing[*]}"
  local -a apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q
    -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
  "${apt[@]}" update
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
}

# A compiler takes about 1.5 GiB for the largest files.
default_jobs() {
  local cores memory_mib limit
  cores=$(nproc)
  memory_mib=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || true)
  if [[ $limit =~ ^[0-9]+$ ]] && ((limit / 1048576 < memory_mib)); then
    memory_mib=$((limit / 1048576))
  fi
  local by_memory=$((memory_mib / 1536))
  ((by_memory < 1)) && by_memory=1
  printf '%s' "$((cores < by_memory ? cores : by_memory))"
}

configure() {
  local folder=$1
  # A build file exists only after a configure that worked; from then on ninja follows changes.
  if [[ -f $folder/build.ninja ]] && ! $charts_came; then
    say "configure: $folder is configured"
    return
  fi
  # The toolkit's own folder is often not in PATH.
  if [[ -z ${CUDACXX:-} && -x /usr/local/cuda/bin/nvcc ]] && ! command -v nvcc >/dev/null; then
    export CUDACXX=/usr/local/cuda/bin/nvcc
  fi
  say "configure: $folder"
  if [[ -n $preset ]]; then
    (cd "$root" && cmake --preset "$preset")
  else
    cmake -S "$root" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release
  fi
}

compile() {
  local folder=$1
  local -a targets=(spindled spindle)
  if $with_tests; then targets=(all); fi
  # With -n ninja only says what it would do.
  if ninja -C "$folder" -n "${targets[@]}" | grep -q 'no work to do'; then
    say "build: $folder is up to date"
    return
  fi
  say "build: $folder, ${jobs:=$(default_jobs)} at a time"
  ninja -C "$folder" -j "$jobs" "${targets[@]}"
}

# npm_packages FOLDER RETRIES: of the lock file there; false when they could not be installed.
npm_packages() {
  local folder=$root/$1
  # npm writes this file last.
  local stamp=$folder/node_modules/.package-lock.json
  if [[ $stamp -nt $folder/package-lock.json ]]; then
    say "npm: the packages of $1 are installed"
    return
  fi
  say "npm: installing the packages of $1"
  node_is_there && (cd "$folder" && npm ci --no-audit --no-fund --fetch-retries="$2")
}

find_charts() { find "$root/ops/dashboard/node_modules/uplot/dist" -name uPlot.esm.js 2>/dev/null || true; }

if $list_only; then
  choose_packages || say "not Debian 12 or Ubuntu 24.04 ($system): names may differ"
  if [[ ${needed[*]} != *npm* ]]; then needed+=(nodejs npm); fi
  printf '%s\n' "${needed[@]}"
  exit 0
fi
if $packages; then
  choose_packages || fail "knows Debian 12 and Ubuntu 24.04, this is '$system'. Install the \
equivalents of these, then use --no-packages: ${needed[*]}"
  install_packages
fi
if $build; then
  folder=$root/build${preset:+-$preset}
  # Before the build, which puts the dashboard's chart library into the daemon.
  had_charts=$(find_charts)
  retries=1
  if $with_tests; then retries=5; fi
  if ! npm_packages ops/dashboard "$retries"; then
    if $with_tests; then fail 'npm ci in ops/dashboard failed: is the npm registry reachable?'; fi
    say 'npm failed: the dashboard is built without charts'
  fi
  charts_came=false
  if [[ $(find_charts) != "$had_charts" ]]; then charts_came=true; fi
  configure "$folder"
  compile "$folder"
  if $with_tests; then
    npm_packages tests/npm 5 ||
      fail 'npm ci in tests/npm failed: are node 18 and the npm registry there?'
  fi
fi
say 'done'
