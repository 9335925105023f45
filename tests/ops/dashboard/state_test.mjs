import assert from 'node:assert/strict';
import { test } from 'node:test';

import { backoffMs, conditions, linkLabel } from '../../../ops/dashboard/logic/health.js';
import { direction, listMoves, spread } from '../../../ops/dashboard/logic/moves.js';
import { arrangeRows, progress } from '../../../ops/dashboard/logic/requests.js';
import { kvShares, silentStages, stageCounters, timeShares } from '../../../ops/dashboard/logic/stages.js';

const idle = { steps: 0, busy: 0, upstream: 0, downstream: 0, empty: 0, compress: 0, transfer: 0 };

test('shares of a stage\'s time', () => {
  const shares = timeShares({ ...idle, busy: 2, upstream: 1, compress: 0.5 }, idle, 5);
  assert.equal(shares.busy, 0.4);
  assert.equal(shares.upstream, 0.2);
  assert.ok(Math.abs(shares.rest - 0.4) < 1e-12);
  assert.equal(shares.compress, 0.1);
  const crowded = timeShares({ ...idle, busy: 6, empty: 2 }, idle, 5);
  assert.equal(crowded.busy + crowded.empty, 1, 'a report that came late');
  assert.equal(timeShares(idle, { ...idle, busy: 1 }, 5), null, 'another process');
  assert.equal(timeShares(idle, idle, 0), null);
  assert.equal(timeShares(idle, undefined, 5), null);
  assert.deepEqual(stageCounters({}), idle);
});

test('how full a pool is', () => {
  assert.deepEqual(kvShares({ kv_capacity_bytes: 8, kv_used_bytes: 2, kv_committed_bytes: 4 }), { used: 0.25, committed: 0.5 });
  assert.deepEqual(kvShares({ kv_capacity_bytes: 0, kv_used_bytes: 2 }), { used: 0, committed: 0 });
});

test('a stage that stands still while others go on', () => {
  const track = new Map();
  const at = (ms, a, b) => silentStages(track, [{ stage: 0, steps: a }, { stage: 1, steps: b }], ms, 10);
  assert.deepEqual(at(0, 1, 1), []);
  assert.deepEqual(at(9000, 2, 1), []);
  assert.deepEqual(at(15000, 3, 1), [{ stage: 1, seconds: 15 }]);
  assert.deepEqual(at(16000, 4, 2), []);
  assert.deepEqual(at(90000, 4, 2), [], 'nobody takes steps: there is nothing to do');
  const reports = (...ages) => silentStages(new Map(), ages.map((age, stage) => ({ stage, steps: 1, report_age_seconds: age })), 0, 10);
  assert.deepEqual(reports(0.5, 30.5), [{ stage: 1, seconds: 30 }]);
  assert.deepEqual(reports(300, 300), [], 'an idle cluster');
  assert.deepEqual(reports(), []);
});

test('what needs attention', () => {
  const state = { draining: false, requests: { running: 2, waiting: 1 } };
  assert.deepEqual(conditions({ state: 'live' }, state, []), []);
  assert.match(conditions({ state: 'lost' }, null, [])[0].title, /Disconnected/);
  const [silent, draining] = conditions({ state: 'live' }, { ...state, draining: true }, [{ stage: 2, seconds: 12.7 }]);
  assert.equal(silent.title, 'Stage 2 does not report');
  assert.equal(silent.detail, 'Nothing for 12 s.');
  assert.match(draining.detail, /3 are left/);
  assert.equal(linkLabel({ state: 'live' }, 0), 'Live');
  assert.equal(linkLabel({ state: 'lost', retryAtMs: 3500 }, 0), 'Retry in 4 s');
  assert.equal(linkLabel({ state: 'lost', retryAtMs: 0 }, 9000), 'Retry in 0 s');
});

test('pauses between attempts', () => {
  assert.equal(backoffMs(0, 1), 1000);
  assert.equal(backoffMs(0, 0), 800);
  assert.equal(backoffMs(2, 1), 4000);
  assert.equal(backoffMs(1000, 1), 10000);
});

test('progress never goes back', () => {
  const request = { state: 'waiting', prompt_tokens: 100, prefilled_tokens: 0, generated_tokens: 0, max_tokens: 300 };
  assert.deepEqual(progress(request), { phase: 'waiting', fraction: 0, promptShare: 0.25, text: '100 prompt tokens' });
  const prefill = progress({ ...request, state: 'running', prefilled_tokens: 40 });
  assert.equal(prefill.phase, 'prefill');
  assert.equal(prefill.fraction, 0.1);
  const decode = progress({ ...request, state: 'running', prefilled_tokens: 100, generated_tokens: 100 });
  assert.equal(decode.phase, 'decode');
  assert.equal(decode.fraction, 0.5);
  assert.equal(decode.text, '100 of at most 300');
  assert.equal(progress({ ...request, prompt_tokens: 0, max_tokens: 0 }).fraction, 0);
});

test('rows stay where they are while somebody points at them', () => {
  const a = { id: '1' };
  const b = { id: '2' };
  const c = { id: '3' };
  const shown = arrangeRows([], [a, b], false);
  assert.deepEqual(shown.map((row) => row.id), ['1', '2']);
  const held = arrangeRows(shown, [c, b], true);
  assert.deepEqual(held.map((row) => [row.id, row.ended]), [['1', true], ['2', false], ['3', false]]);
  assert.deepEqual(arrangeRows(held, [c, b], false).map((row) => row.id), ['3', '2']);
});

test('the balancer\'s moves', () => {
  const moves = [{ stage: 0, from_ratio: 0.5, to_ratio: 0.3 }, { stage: 1, from_ratio: 0.3, to_ratio: 0.4 }, { stage: 0, from_ratio: 0.3, to_ratio: 0.6 }];
  assert.equal(direction(moves[0]), 'stronger');
  assert.equal(direction(moves[1]), 'lighter');
  assert.deepEqual(listMoves(moves, null, 2), [moves[2], moves[1]]);
  assert.deepEqual(listMoves(moves, 0, 64), [moves[2], moves[0]]);
  assert.deepEqual(listMoves(undefined, 0, 64), []);
});

test('labels do not overlap', () => {
  assert.deepEqual(spread([10, 50], 12, 0, 100), [10, 50]);
  assert.deepEqual(spread([50, 50, 50], 12, 0, 100), [50, 62, 74]);
  assert.deepEqual(spread([99, 98], 12, 0, 100), [100, 88]);
  assert.deepEqual(spread([], 12, 0, 100), []);
});
