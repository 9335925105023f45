// A chart over time: uPlot with the page's colours, a legend that follows the pointer, and a table.
// In a build without uPlot the table is all there is.

import { clock } from '../logic/format.js';
import { firstWithin, summary } from '../logic/series.js';
import { color, fillList, make, setAttribute, setText } from './dom.js';
import { TableBehind } from './table.js';

const FONT = '11px ui-sans-serif, system-ui, sans-serif';
const HEIGHT = 150;
const SYNC = 'spindle';

export async function loadChartLibrary() {
  try {
    const library = (await import('../uplot/uPlot.esm.js')).default;
    document.head.append(make('link', {
      rel: 'stylesheet', href: new URL('../uplot/uPlot.min.css', import.meta.url),
    }));
    return library;
  } catch {
    return null;
  }
}

// Seconds only where ticks are less than a minute apart.
function timeTexts(u, splits, axis, space, step) {
  return splits.map((at) => clock(at * 1000).slice(0, step < 60 ? 8 : 5));
}

// A young page shows what it has, stretched to at least this.
const MIN_SPAN_SECONDS = 60;

export class LineChart {
  // series: [{ label, color (of the style sheet), dash, width, fill }]; format: number to text.
  // options: height, axisWidth, rightPadding, tick (numbers at the axis), steps() (distances
  // of its ticks to choose from), legend (false: none), onDraw(u).
  constructor(Library, panel, series, format, options = {}) {
    this.Library = Library;
    this.panel = panel;
    this.frame = panel.querySelector('.chart');
    this.legend = panel.querySelector('.chart-legend');
    this.format = format;
    this.options = options;
    this.caption = panel.querySelector('h2, h3').textContent;
    this.frame.setAttribute('role', 'img');
    this.setSeries(series);
    this.table = new TableBehind(panel, this.frame, [
      { label: 'Series' }, { label: 'Now', numeric: true }, { label: 'Least', numeric: true },
      { label: 'Mean', numeric: true }, { label: 'Most', numeric: true }], this.caption);
    this.table.onOpen = () => this.#size();
    if (!Library) {
      this.table.toggle();
      this.table.button.hidden = true;
    }
    new ResizeObserver(() => this.#size()).observe(this.frame);
  }

  setSeries(series) {
    this.series = series;
    this.chart?.destroy();
    this.chart = null;
    if (!this.Library) return;
    this.chart = new this.Library(this.#uplotOptions(), [[], ...series.map(() => [])], this.frame);
  }

  #uplotOptions() {
    const { options } = this;
    const axis = {
      stroke: () => color('text-faint'), font: FONT, ticks: { show: false },
      grid: { stroke: () => color('grid'), width: 1 },
    };
    return {
      width: Math.max(120, this.frame.clientWidth),
      height: options.height ?? HEIGHT,
      padding: [8, options.rightPadding ?? 20, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: SYNC }, drag: { x: false, y: false }, points: { size: 6 }, y: false,
      },
      scales: {
        x: { time: true },
        y: { range: (u, low, high) => [0, high > 0 ? high * 1.1 : 1] },
      },
      axes: [
        { ...axis, space: 70, values: timeTexts, grid: { show: false }, size: 24, gap: 4 },
        {
          ...axis, size: options.axisWidth ?? 58, gap: 6, space: 28,
          incrs: options.steps ? () => options.steps() : undefined,
          values: (u, splits) => splits.map((at) => (options.tick ?? this.format)(at)),
        },
      ],
      series: [{}, ...this.series.map((one) => ({
        label: one.label,
        stroke: () => color(one.color),
        width: one.width ?? 1.5,
        dash: one.dash,
        fill: one.fill ? () => color(one.fill) : undefined,
        points: { show: false },
        spanGaps: false,
        paths: one.stepped ? this.Library.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: {
        draw: [(u) => options.onDraw?.(u)],
        setCursor: [() => this.#texts()],
      },
    };
  }

  #size() {
    const width = this.frame.clientWidth;
    if (this.chart && width > 0 && width !== this.chart.width) {
      this.chart.setSize({ width, height: this.options.height ?? HEIGHT });
    }
  }

  // time in seconds, a column per series; the last `seconds` are shown.
  update(time, columns, seconds) {
    const first = firstWithin(time, seconds);
    this.data = [time.slice(first), ...columns.map((column) => column.slice(first))];
    if (this.chart && !this.table.open) {
      const last = time.length > 0 ? time[time.length - 1] : 0;
      this.chart.batch(() => {
        this.chart.setData(this.data, false);
        const span = Math.min(seconds, Math.max(MIN_SPAN_SECONDS, last - (time[0] ?? last)));
        this.chart.setScale('x', { min: last - span, max: last });
      });
    }
    this.#texts();
  }

  redraw() {
    this.chart?.redraw(false, true);
  }

  #texts() {
    if (!this.data) return;
    const [, ...columns] = this.data;
    const summaries = columns.map((column) => summary(column, 0));
    const at = this.chart?.cursor.idx ?? null;
    if (this.options.legend !== false) {
      fillList(this.legend, this.series, () => make('li', {}, make('i.line'), make('span'), make('b')),
        (node, one, i) => {
          setAttribute(node.firstChild, 'class', `line line-${one.color}${one.dash ? ' dashed' : ''}`);
          setText(node.children[1], one.label);
          const value = at !== null ? columns[i][at] : summaries[i].last;
          setText(node.children[2], this.format(value ?? NaN));
        });
    }
    setAttribute(this.frame, 'aria-label', `${this.caption}: ${this.series.slice(0, 8).map((one, i) => (
      `${one.label} ${this.format(summaries[i].last ?? NaN)}`)).join(', ')}`);
    this.table.update(() => this.series.map((one, i) => {
      const { last, min, mean, max } = summaries[i];
      return [one.label, ...[last, min, mean, max].map((value) => this.format(value ?? NaN))];
    }));
  }
}
