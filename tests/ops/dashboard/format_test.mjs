import assert from 'node:assert/strict';
import { test } from 'node:test';

import { pickScheme } from '../../../ops/dashboard/logic/colors.js';
import * as format from '../../../ops/dashboard/logic/format.js';

test('counts', () => {
  assert.equal(format.count(0), '0');
  assert.equal(format.count(12345), '12,345');
  assert.equal(format.count(123456), '123k');
  assert.equal(format.count(99999999), '100M');
  assert.equal(format.count(1.5e9), '1.50G');
  assert.equal(format.rate(0), '0');
  assert.equal(format.rate(9.876), '9.88');
  assert.equal(format.rate(98.76), '98.8');
  assert.equal(format.rate(1234.5), '1,235');
});

test('bytes', () => {
  assert.equal(format.bytes(0), '0 B');
  assert.equal(format.bytes(999), '999 B');
  assert.equal(format.bytes(1000), '0.98 KiB');
  assert.equal(format.bytes(1536), '1.50 KiB');
  assert.equal(format.bytes(448 * 1024 ** 2), '448 MiB');
  assert.equal(format.bytes(80 * 1024 ** 3), '80.0 GiB');
  assert.equal(format.bytes(3000 * 1024 ** 5), '3000 PiB');
});

test('percentages', () => {
  assert.equal(format.percent(0), '0%');
  assert.equal(format.percent(0.0004), '<0.1%');
  assert.equal(format.percent(0.012), '1.2%');
  assert.equal(format.percent(0.0996), '10%');
  assert.equal(format.percent(1), '100%');
  assert.equal(format.percentTick(0.0025), '0.25%');
  assert.equal(format.percentTick(0.1 + 0.2), '30%');
});

test('times', () => {
  assert.equal(format.seconds(0), '0');
  assert.equal(format.seconds(0.00012), '120 µs');
  assert.equal(format.seconds(0.0234), '23.4 ms');
  assert.equal(format.seconds(3.797), '3.80 s');
  assert.equal(format.seconds(125), '2 min 5 s');
  assert.equal(format.secondsTick(0.05), '50 ms');
  assert.equal(format.secondsTick(0.0125), '12.5 ms');
  assert.equal(format.secondsTick(5), '5 s');
  assert.equal(format.secondsTick(100), '100 s');
  assert.equal(format.secondsTick(0), '0');
  assert.equal(format.duration(59.9), '59 s');
  assert.equal(format.duration(3600), '1 h 0 min');
  assert.equal(format.duration(90061), '1 d 1 h');
  assert.match(format.clock(Date.UTC(2026, 0, 2, 3, 4, 5)), /^\d\d:\d\d:05$/);
});

test('what is not a number is a dash', () => {
  for (const name of ['count', 'rate', 'bytes', 'percent', 'percentTick', 'seconds', 'duration', 'clock']) {
    for (const value of [NaN, undefined, null, Infinity]) assert.equal(format[name](value), '–', `${name} of ${value}`);
  }
});

test('layers of a stage', () => {
  assert.equal(format.layerRange({ first_layer: 3, n_layers: 4 }), '3–6');
  assert.equal(format.layerRange({ first_layer: 3, n_layers: 1 }), '3');
  assert.equal(format.layerRange({ first_layer: 3, n_layers: 0 }), 'none');
  assert.equal(format.plural(1, 'layer'), '1 layer');
  assert.equal(format.plural(0, 'layer'), '0 layers');
});

test('colours for canvases', () => {
  assert.equal(pickScheme('light-dark(#fff, #000)', 'light'), '#fff');
  assert.equal(pickScheme(' light-dark(rgb(0 0 0 / 0.2), rgb(255 255 255 / 0.2)) ', 'dark'), 'rgb(255 255 255 / 0.2)');
  assert.equal(pickScheme(' #123456', 'dark'), '#123456');
  assert.equal(pickScheme('', 'dark'), '');
});
