import assert from 'node:assert/strict';
import { test } from 'node:test';

import { difference, quantile, total } from '../../../ops/dashboard/logic/histogram.js';
import { History, sampleBefore } from '../../../ops/dashboard/logic/history.js';
import { binarySteps, decimalSteps, firstWithin, shares, summary } from '../../../ops/dashboard/logic/series.js';
import { randomSource, Simulation } from './simulation.mjs';

const histogram = (counts, bounds = [1, 2, 4]) => ({ bounds, counts, sum: 0 });

test('quantiles are linear within a bucket', () => {
  assert.equal(quantile(histogram([0, 10, 10, 10]), 0.5), 1.5);
  assert.equal(quantile(histogram([10, 10, 10, 10]), 0.5), 0.5);
  assert.equal(quantile(histogram([5, 10, 10, 10]), 0.5), 1);
  assert.equal(quantile(histogram([0, 0, 4, 4]), 0.25), 2.5);
  assert.equal(quantile(histogram([0, 0, 0, 3]), 0.5), 4, 'beyond the last bound');
  assert.equal(quantile(histogram([0, 0, 0, 0]), 0.5), null);
  assert.equal(quantile(null, 0.5), null);
  assert.equal(quantile(histogram([2], []), 0.5), null);
});

test('quantiles lie in the bucket of the sorted sample, whatever was observed', () => {
  const seed = Math.floor(Math.random() * 2 ** 31);
  const random = randomSource(seed);
  const bounds = [0.01, 0.1, 0.5, 1, 3];
  for (let round = 0; round < 200; round += 1) {
    const values = Array.from({ length: 1 + Math.floor(random() * 40) }, () => 3 * random() ** 3).sort((a, b) => a - b);
    const counts = [...bounds, Infinity].map((bound) => values.filter((value) => value <= bound).length);
    for (const q of [0.05, 0.5, 0.95]) {
      const exact = values[Math.ceil(q * values.length) - 1];
      const bucket = bounds.findIndex((bound) => exact <= bound);
      const got = quantile({ bounds, counts, sum: 0 }, q);
      assert.ok(got >= (bucket === 0 ? 0 : bounds[bucket - 1]) && got <= bounds[bucket], `seed ${seed}: q ${q} of ${values}: ${got}`);
    }
  }
});

test('differences of histograms', () => {
  assert.deepEqual(difference(histogram([3, 5, 5, 6]), histogram([1, 2, 2, 2])).counts, [2, 3, 3, 4]);
  assert.equal(total(difference(histogram([3, 5, 5, 6]), histogram([1, 2, 2, 2]))), 4);
  assert.equal(difference(histogram([0, 0, 0, 1]), histogram([1, 2, 2, 2])), null, 'another process');
  assert.equal(difference(histogram([0, 1], [1]), histogram([1, 2, 2, 2])), null, 'other buckets');
  assert.equal(difference(null, histogram([1, 2, 2, 2])), null);
});

test('the sample to compare with', () => {
  const samples = [0, 1000, 2000, 3000].map((atMs) => ({ atMs }));
  assert.equal(sampleBefore(samples, 4000, 2).atMs, 2000);
  assert.equal(sampleBefore(samples, 4000, 2.5).atMs, 1000);
  assert.equal(sampleBefore(samples, 4000, 60).atMs, 0);
  assert.equal(sampleBefore(samples, 4050, 2.1).atMs, 2000, 'a tick that came a little early');
  assert.equal(sampleBefore([], 4000, 2), null);
});

test('rates are what was done between the snapshots', () => {
  const simulation = new Simulation({ seed: 7, startMs: 1e12 });
  const history = new History();
  const states = Array.from({ length: 20 }, () => structuredClone(simulation.step()));
  states.forEach((state) => history.add(state));
  const last = states[19];
  const before = states[14];
  const { columns } = history;
  assert.equal(columns.time.length, 20);
  assert.equal(columns.generation[19], (last.generation_tokens - before.generation_tokens) / 5);
  assert.equal(columns.generation[0], null, 'one snapshot is no rate');
  assert.equal(columns.ttft50[0], null);
  const [share] = history.shares;
  assert.ok(Math.abs(share.busy - (last.stages[0].busy_seconds - before.stages[0].busy_seconds) / 5) < 1e-9);
  const sum = share.busy + share.upstream + share.downstream + share.empty + share.rest;
  assert.ok(Math.abs(sum - 1) < 1e-9, String(sum));
});

test('a restarted server begins anew, with a gap', () => {
  const first = new Simulation({ seed: 1, startMs: 1e12 });
  first.uptime = 50000;
  const history = new History();
  for (let i = 0; i < 10; i += 1) assert.equal(history.add(first.step()), false);
  const second = new Simulation({ seed: 2, startMs: 1e12 + 30000 });
  second.uptime = 1;
  assert.equal(history.add(second.step()), true);
  history.add(second.step());
  const { generation, time, running } = history.columns;
  assert.equal(running[10], null, 'the gap');
  assert.equal(generation[11], null);
  assert.ok(generation[12] >= 0);
  assert.ok(time.every((at, i) => i === 0 || at > time[i - 1]), 'times ascend');
  for (const columns of history.stages) assert.equal(columns.used.length, time.length);
});

test('other stages after a restart', () => {
  const history = new History();
  const first = new Simulation({ stages: 3, startMs: 1e12 });
  for (let i = 0; i < 5; i += 1) history.add(first.step());
  const second = new Simulation({ stages: 2, startMs: 1e12 + 60000 });
  assert.equal(history.add(second.step()), true);
  assert.equal(history.stages.length, 2);
  assert.equal(history.shares.length, 2);
  for (const columns of history.stages) assert.equal(columns.level.length, history.columns.time.length);
});

test('a clock that was set back does not stop the page', () => {
  const history = new History();
  const simulation = new Simulation({ startMs: 1e12 });
  for (let i = 0; i < 5; i += 1) history.add(simulation.step());
  simulation.nowMs -= 3600 * 1000;
  history.add(simulation.step());
  history.add(simulation.step());
  assert.equal(history.columns.time.length, 2);
  const again = simulation.state();
  history.add(again);
  assert.equal(history.columns.time.length, 2, 'the same picture twice is one row');
});

test('what is old is forgotten', () => {
  const history = new History(60);
  const simulation = new Simulation({ startMs: 1e12 });
  for (let i = 0; i < 200; i += 1) history.add(simulation.step());
  assert.equal(history.columns.time.length, 61);
  assert.equal(history.stages[0].used.length, 61);
  assert.ok(history.samples.length <= 37, String(history.samples.length));
});

test('a state without the parts of newer servers', () => {
  const state = new Simulation({ startMs: 1e12 }).step();
  delete state.latency;
  delete state.balancer;
  state.stages.forEach((stage) => { delete stage.bubble_seconds; delete stage.layers; });
  const history = new History();
  history.add(state);
  assert.equal(history.columns.ttft95[0], null);
});

test('parts of columns', () => {
  assert.equal(firstWithin([], 10), 0);
  assert.equal(firstWithin([0, 5, 10, 15], 10), 1);
  assert.equal(firstWithin([0, 5, 10, 15], 100), 0);
  assert.deepEqual(summary([5, null, 1, 3], 1), { last: 3, min: 1, mean: 2, max: 3 });
  assert.deepEqual(summary([null], 0), { last: null, min: null, mean: null, max: null });
  assert.deepEqual(shares([1, null, 3], [2, 2, 0]), [0.5, null, null]);
});

test('ticks', () => {
  assert.deepEqual(decimalSteps(-1, 1), [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]);
  assert.deepEqual(binarySteps().slice(9, 12), [512, 1024, 2048]);
});
