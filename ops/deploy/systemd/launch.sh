#!/bin/bash
# Starts the cluster: turns the variables of /etc/default/spindle into one mpirun, which takes this
# process's place, so that signals reach it.
#
#   SPINDLE_CONFIG          configuration file (needed)
#   SPINDLE_STAGES          ranks; default 1
#   SPINDLE_OPTIONS         further options of spindled
#   SPINDLE_HOSTFILE        several hosts; then also SPINDLE_NETWORK, the network they share
#   SPINDLE_MPIRUN_OPTIONS  further options of mpirun
#   SPINDLED                the daemon; default: spindled in PATH
#   SPINDLE_API_KEY         goes to the ranks in their environment
#
# `launch --print` shows the command and starts nothing. Exit code 2: wrong settings.
set -euo pipefail

fail() {
  printf 'spindle launch: %s\n' "$*" >&2
  exit 2
}

stages=${SPINDLE_STAGES:-1}
if ! [[ $stages =~ ^[1-9][0-9]{0,3}$ ]]; then
  fail "SPINDLE_STAGES must be a number from 1 to 9999, not '$stages'"
fi
config=${SPINDLE_CONFIG:-}
[[ -n $config ]] || fail 'SPINDLE_CONFIG is not set'
[[ -r $config ]] || fail "cannot read the configuration $config"
program=$(command -v -- "${SPINDLED:-spindled}") || fail "there is no ${SPINDLED:-spindled}"
command -v mpirun >/dev/null || fail 'there is no mpirun (Debian: openmpi-bin)'
read -r -a options <<<"${SPINDLE_OPTIONS:-}"
read -r -a mpirun_options <<<"${SPINDLE_MPIRUN_OPTIONS:-}"

# A rank's threads are its own affair; stages may outnumber the cores.
command=(mpirun -n "$stages" --bind-to none)
if [[ -n ${SPINDLE_HOSTFILE:-} ]]; then
  [[ -r $SPINDLE_HOSTFILE ]] || fail "cannot read the hostfile $SPINDLE_HOSTFILE"
  command+=(--hostfile "$SPINDLE_HOSTFILE")
  if [[ -n ${SPINDLE_NETWORK:-} ]]; then
    command+=(--mca btl_tcp_if_include "$SPINDLE_NETWORK" --mca oob_tcp_if_include "$SPINDLE_NETWORK")
  fi
  if [[ -n ${SPINDLE_API_KEY:-} ]]; then command+=(-x SPINDLE_API_KEY); fi
else
  [[ -z ${SPINDLE_NETWORK:-} ]] || fail 'SPINDLE_NETWORK needs SPINDLE_HOSTFILE'
  # All ranks are here: shared memory, and no port for each other.
  command+=(--oversubscribe --mca btl "self,vader" --mca oob_tcp_if_include lo)
fi
command+=("${mpirun_options[@]}" "$program" --config "$config" "${options[@]}")

if [[ ${1:-} == --print ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
