import assert from 'node:assert/strict';
import { test } from 'node:test';

import { cellAt, cellRect, layout, neighbour } from '../../../ops/dashboard/logic/heat.js';
import { keptShare, parsePlan, planTotals } from '../../../ops/dashboard/logic/plans.js';

const SHAPES = [
  { counts: [4, 4, 4], width: 770 }, { counts: [12], width: 360 }, { counts: [7, 5], width: 770 }, { counts: [5, 4, 3], width: 770 },
  { counts: new Array(8).fill(10), width: 770 }, { counts: new Array(64).fill(2), width: 770 },
  { counts: new Array(64).fill(128), width: 770 }, { counts: new Array(64).fill(128), width: 340 },
  { counts: [1, 0, 80], width: 500 }, { counts: [3], width: 20 },
];

for (const { counts, width } of SHAPES) {
  test(`${counts.length} stages, ${counts.reduce((a, b) => a + b, 0)} layers, ${width} px: every cell has its place`, () => {
    const picture = layout(counts, width, 300);
    assert.equal(picture.total, counts.reduce((a, b) => a + b, 0));
    const taken = new Set();
    for (let cell = 0; cell < picture.total; cell += 1) {
      const rect = cellRect(picture, cell);
      assert.ok(rect.x >= 0 && rect.y >= 0 && rect.y + rect.height <= picture.height + 1, `cell ${cell}`);
      assert.ok(rect.x + rect.width <= Math.max(width, 60), `cell ${cell} is ${rect.x + rect.width} wide`);
      const key = `${rect.x},${rect.y}`;
      assert.ok(!taken.has(key), `two cells at ${key}`);
      taken.add(key);
      assert.equal(cellAt(picture, rect.x + rect.width / 2, rect.y + rect.height / 2), cell);
    }
    assert.equal(cellAt(picture, -1, -1), -1);
    assert.equal(cellAt(picture, 1e6, 5), -1);
  });
}

test('few layers get large cells in one row, many stay in reach', () => {
  const few = layout([4, 4, 4], 770, 300);
  assert.ok(few.size.width >= 52 && new Set(few.groups.map((group) => group.y)).size === 1);
  const uneven = layout([5, 4, 3], 770, 300);
  assert.ok(uneven.size.width >= 52 && new Set(uneven.groups.map((group) => group.y)).size === 1);
  const many = layout(new Array(64).fill(128), 770, 300);
  assert.ok(many.height <= 500, String(many.height));
  assert.ok(many.inLines);
  assert.equal(layout([], 770, 300).height, 0);
});

test('arrow keys reach every layer and stay in the picture', () => {
  for (const { counts, width } of SHAPES) {
    const picture = layout(counts, width, 300);
    let cell = 0;
    for (let i = 1; i < picture.total; i += 1) {
      cell = neighbour(picture, cell, 'ArrowRight');
      assert.equal(cell, i);
    }
    assert.equal(neighbour(picture, cell, 'ArrowRight'), cell);
    assert.equal(neighbour(picture, 0, 'ArrowLeft'), 0);
    assert.equal(neighbour(picture, 0, 'ArrowUp'), 0);
    assert.equal(neighbour(picture, 5 % picture.total, 'End'), picture.total - 1);
    assert.equal(neighbour(picture, cell, 'Home'), 0);
    assert.equal(neighbour(picture, cell, 'x'), cell);
  }
  const lines = layout(new Array(64).fill(128), 770, 300);
  assert.equal(neighbour(lines, 5, 'ArrowDown'), 133);
  assert.equal(neighbour(lines, 133, 'ArrowUp'), 5);
});

test('plans by name', () => {
  assert.deepEqual(parsePlan('FULL raw/raw'), { mode: 'full', codec: 'raw', label: 'raw' });
  assert.deepEqual(parsePlan('EVICT lloyd2/lloyd2'), { mode: 'evict', codec: 'bits2', label: 'evict lloyd2' });
  assert.deepEqual(parsePlan('STREAM int4/int4 128'), { mode: 'stream', codec: 'bits4', label: 'window int4' });
  assert.deepEqual(parsePlan('FULL token'), { mode: 'full', codec: 'token', label: 'token' });
  assert.deepEqual(parsePlan('FULL kivi4/kivi2'), { mode: 'full', codec: 'bits2', label: 'kivi4/kivi2' });
  assert.equal(parsePlan('FULL codebook/codebook').codec, 'codebook');
  assert.equal(parsePlan('FULL fp7/fp7').codec, 'other');
  assert.equal(parsePlan('something new').codec, 'other');
  assert.equal(parsePlan('').codec, 'none');
  assert.equal(parsePlan(undefined).codec, 'none');
});

test('plans in use', () => {
  const stages = [
    { layers: [{ plan: 'A', used_bytes: 1, full_bytes: 4 }, { plan: 'B', used_bytes: 1, full_bytes: 1 }] },
    { layers: [{ plan: 'A', used_bytes: 2, full_bytes: 4 }] }, {},
  ];
  assert.deepEqual(planTotals(stages), [
    { plan: 'A', layers: 2, used: 3, full: 8 }, { plan: 'B', layers: 1, used: 1, full: 1 }]);
  assert.equal(keptShare({ used_bytes: 1, full_bytes: 4 }), 0.25);
  assert.equal(keptShare({ used_bytes: 5, full_bytes: 4 }), 1);
  assert.equal(keptShare({ used_bytes: 0, full_bytes: 0 }), null);
});
