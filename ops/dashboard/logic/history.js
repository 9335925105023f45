// What the page remembers: a row per state that came, in columns as charts want them. Rates and
// quantiles are differences of the server's counters over the last seconds.

import { difference, quantile } from './histogram.js';
import { stageCounters, timeShares } from './stages.js';

export const RATE_SECONDS = 5;
export const QUANTILE_SECONDS = 30;
export const KEEP_SECONDS = 15 * 60;
const LATENCIES = {
  ttft: 'time_to_first_token_seconds',
  itl: 'inter_token_latency_seconds',
  e2e: 'e2e_request_latency_seconds',
};
const COLUMNS = ['time', 'generation', 'prompt', 'running', 'waiting',
  ...Object.keys(LATENCIES).flatMap((key) => [`${key}50`, `${key}95`])];
const STAGE_COLUMNS = ['used', 'committed', 'budget', 'capacity', 'level'];

function countersOf(state) {
  return {
    atMs: state.unix_ms,
    uptime: state.uptime_seconds,
    generation: state.generation_tokens,
    prompt: state.prompt_tokens,
    accepted: state.requests.accepted,
    latency: Object.fromEntries(Object.entries(LATENCIES)
      .map(([key, name]) => [key, state.latency?.[name] ?? null])),
    stages: state.stages.map(stageCounters),
  };
}

// Counters of another process, or of other stages, cannot be compared.
function isRestart(before, now) {
  return now.uptime < before.uptime || now.generation < before.generation
    || now.accepted < before.accepted || now.stages.length !== before.stages.length;
}

// The newest of `samples` (oldest first) that is at least `seconds` old; else the oldest.
export function sampleBefore(samples, nowMs, seconds) {
  for (let i = samples.length - 1; i >= 0; i -= 1) {
    if (nowMs - samples[i].atMs >= seconds * 1000 - 100) return samples[i];
  }
  return samples[0] ?? null;
}

export class History {
  constructor(keepSeconds = KEEP_SECONDS) {
    this.keepSeconds = keepSeconds;
    this.samples = [];
    this.columns = Object.fromEntries(COLUMNS.map((name) => [name, []]));
    this.stages = [];
    this.shares = [];  // of the newest state, by stage; null where unknown
  }

  // Returns whether this state begins a new process.
  add(state) {
    const now = countersOf(state);
    const before = this.samples[this.samples.length - 1];
    const restarted = before !== undefined && isRestart(before, now);
    const setBack = before !== undefined && now.atMs < before.atMs;
    if (setBack) {
      this.#clear();  // another clock: times in a chart must not go back
    } else if (restarted) {
      this.samples = [];
      this.#addGap(now.atMs / 1000 - 0.001, state.stages.length);
    } else if (before !== undefined && now.atMs === before.atMs) {
      return false;  // the same picture again
    }
    this.#addRow(now, state);
    this.samples.push(now);
    this.#forget(now.atMs);
    return restarted;
  }

  #clear() {
    this.samples = [];
    for (const name of COLUMNS) this.columns[name].length = 0;
    this.stages = [];
  }

  #addRow(now, state) {
    const recent = sampleBefore(this.samples, now.atMs, RATE_SECONDS);
    const elapsed = recent ? (now.atMs - recent.atMs) / 1000 : 0;
    const perSecond = (key) => (elapsed > 0 ? (now[key] - recent[key]) / elapsed : null);
    const row = {
      time: now.atMs / 1000,
      generation: perSecond('generation'),
      prompt: perSecond('prompt'),
      running: state.requests.running,
      waiting: state.requests.waiting,
    };
    const base = sampleBefore(this.samples, now.atMs, QUANTILE_SECONDS);
    for (const key of Object.keys(LATENCIES)) {
      const seen = base ? difference(now.latency[key], base.latency[key]) : null;
      row[`${key}50`] = quantile(seen, 0.5);
      row[`${key}95`] = quantile(seen, 0.95);
    }
    for (const name of COLUMNS) this.columns[name].push(row[name]);
    this.shares = now.stages.map((stage, i) => timeShares(stage, recent?.stages[i], elapsed));
    this.#stageColumns(state.stages.length);
    state.stages.forEach((stage, i) => {
      const columns = this.stages[i];
      columns.used.push(stage.kv_used_bytes);
      columns.committed.push(stage.kv_committed_bytes ?? null);
      columns.budget.push(stage.kv_budget_bytes ?? null);
      columns.capacity.push(stage.kv_capacity_bytes);
      columns.level.push(stage.kv_level_ratio > 0 ? stage.kv_level_ratio : null);
    });
  }

  // One set of columns per stage, each as long as the others. Other stages: those before are gone.
  #stageColumns(n) {
    if (this.stages.length === n) return;
    const missing = this.columns.time.length - 1;
    this.stages = Array.from({ length: n }, () => Object.fromEntries(
      STAGE_COLUMNS.map((name) => [name, new Array(missing).fill(null)])));
  }

  #addGap(time, nStages) {
    for (const name of COLUMNS) this.columns[name].push(name === 'time' ? time : null);
    if (this.stages.length !== nStages) this.stages = [];
    for (const columns of this.stages) {
      for (const name of STAGE_COLUMNS) columns[name].push(null);
    }
  }

  #forget(nowMs) {
    const { time } = this.columns;
    const oldest = nowMs / 1000 - this.keepSeconds;
    let n = 0;
    while (n < time.length && time[n] < oldest) n += 1;
    if (n > 0) {
      for (const name of COLUMNS) this.columns[name].splice(0, n);
      for (const columns of this.stages) {
        for (const name of STAGE_COLUMNS) columns[name].splice(0, n);
      }
    }
    const needed = nowMs - (QUANTILE_SECONDS + 5) * 1000;
    while (this.samples.length > 2 && this.samples[1].atMs < needed) this.samples.shift();
  }
}
