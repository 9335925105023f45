// Throughput and latencies.

import { count, rate, seconds, secondsTick } from '../logic/format.js';
import { decimalSteps } from '../logic/series.js';
import { LineChart } from './line_chart.js';

const QUANTILES = [
  { label: 'p95', color: 'line-strong', width: 1.75 },
  { label: 'p50', color: 'line-soft', dash: [4, 3] },
];

export class ServiceCharts {
  constructor(Library, find) {
    this.charts = [
      ['generation', 'prompt', new LineChart(Library, find('throughput'), [
        { label: 'generated', color: 'line-strong', width: 1.75, fill: 'line-fill' },
        { label: 'prompt', color: 'line-soft', dash: [4, 3] }], rate)],
      ['running', 'waiting', new LineChart(Library, find('load'), [
        { label: 'running', color: 'line-strong', width: 1.75, fill: 'line-fill', stepped: true },
        { label: 'waiting', color: 'line-alert', dash: [4, 3], stepped: true }], count, { axisWidth: 44, steps: () => decimalSteps(0, 6) })],
      ...['ttft', 'itl', 'e2e'].map((key) => (
        [`${key}95`, `${key}50`, new LineChart(Library, find(key), QUANTILES, seconds, { tick: secondsTick })])),
    ];
  }

  update(history, windowSeconds) {
    const { columns } = history;
    for (const [first, second, chart] of this.charts) {
      chart.update(columns.time, [columns[first], columns[second]], windowSeconds);
    }
  }

  redraw() {
    for (const [, , chart] of this.charts) chart.redraw();
  }
}
