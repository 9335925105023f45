// What a stage did with its time, and whether it still reports.

export const TIME_PARTS = [
  { key: 'busy', label: 'Busy', explain: 'computing' },
  { key: 'upstream', label: 'Upstream', explain: 'waiting for the stage before' },
  { key: 'downstream', label: 'Downstream', explain: 'waiting for the stage after' },
  { key: 'empty', label: 'Empty', explain: 'nothing to do' },
];

// The counters of a stage that shares are made of.
export function stageCounters(stage) {
  const bubble = stage.bubble_seconds ?? {};
  return {
    steps: stage.steps ?? 0,
    busy: stage.busy_seconds ?? 0,
    upstream: bubble.upstream ?? 0,
    downstream: bubble.downstream ?? 0,
    empty: bubble.empty ?? 0,
    compress: stage.compress_seconds ?? 0,
    transfer: stage.transfer_seconds ?? 0,
  };
}

// Shares of the time between two snapshots, each 0 to 1 and together at most 1: reports of a stage
// come at steps, not at our seconds, so that a difference may be longer than the time that passed.
// null when there is nothing to compare.
export function timeShares(now, before, elapsedSeconds) {
  if (!now || !before || !(elapsedSeconds > 0)) return null;
  const keys = TIME_PARTS.map((part) => part.key);
  const spent = keys.map((key) => now[key] - before[key]);
  if (spent.some((value) => value < 0)) return null;
  const base = Math.max(elapsedSeconds, spent.reduce((sum, value) => sum + value, 0));
  const shares = Object.fromEntries(keys.map((key, i) => [key, spent[i] / base]));
  shares.rest = Math.max(0, 1 - keys.reduce((sum, key) => sum + shares[key], 0));
  for (const key of ['compress', 'transfer']) {
    shares[key] = Math.min(1, Math.max(0, now[key] - before[key]) / base);
  }
  return shares;
}

// How full a stage's KV pool is, by what is used and by what the ledger has promised.
export function kvShares(stage) {
  const capacity = stage.kv_capacity_bytes;
  if (!(capacity > 0)) return { used: 0, committed: 0 };
  return {
    used: Math.min(1, stage.kv_used_bytes / capacity),
    committed: Math.min(1, (stage.kv_committed_bytes ?? 0) / capacity),
  };
}

// The stages that fell silent while others report or take steps: { stage, seconds } each. `track` is
// the Map that remembers, by stage, the last change; pass the same one every time. When all are
// silent there is nothing to do.
export function silentStages(track, stages, nowMs, limitSeconds) {
  for (const stage of stages) {
    const known = track.get(stage.stage);
    if (!known || known.steps !== stage.steps) {
      track.set(stage.stage, { steps: stage.steps, atMs: nowMs });
    }
  }
  const ages = stages.map((stage) => (Number.isFinite(stage.report_age_seconds)
    ? stage.report_age_seconds : (nowMs - track.get(stage.stage).atMs) / 1000));
  const newest = Math.min(...ages);
  return stages.map((stage, i) => ({ stage: stage.stage, seconds: ages[i] - newest }))
    .filter(({ seconds }) => seconds > limitSeconds);
}
