// KV by stage over time: how full the pools are, the size that layers are planned for, and the
// balancer's moves, marked in the chart and explained in a list.

import { bytes, clock, percent, percentTick } from '../logic/format.js';
import { direction, listMoves, spread } from '../logic/moves.js';
import { binarySteps, decimalSteps, shares } from '../logic/series.js';
import { color, fillList, make, setAttribute, setText } from './dom.js';
import { LineChart } from './line_chart.js';

// More stages than this are one family of thin lines.
const MAX_NAMED = 8;
const MAX_LISTED = 64;

function stageSeries(stages, stepped) {
  const named = stages.length <= MAX_NAMED;
  return stages.map((stage, i) => ({
    label: `Stage ${stage.stage}`,
    color: named ? `stage-${i}` : 'line-many',
    width: named ? 1.5 : 0.75,
    stepped,
  }));
}

// Names at the right end of the lines, so that no colour must be compared with a legend.
function drawEndLabels(u, labels) {
  const { ctx, bbox } = u;
  const scale = window.devicePixelRatio || 1;
  const ends = [];
  for (let i = 1; i < u.series.length; i += 1) {
    const data = u.data[i];
    const value = data[data.length - 1];
    if (value === null || value === undefined) continue;
    ends.push({ text: labels[i - 1], y: u.valToPos(value, 'y', true), series: i });
  }
  const placed = spread(ends.map((end) => end.y), 12 * scale, bbox.top, bbox.top + bbox.height);
  ctx.save();
  ctx.font = `${11 * scale}px ui-sans-serif, system-ui, sans-serif`;
  ctx.textAlign = 'left';
  ctx.textBaseline = 'middle';
  ends.forEach((end, k) => {
    ctx.fillStyle = u.series[end.series].stroke(u, end.series);
    ctx.fillText(end.text, bbox.left + bbox.width + 6 * scale, placed[k]);
  });
  ctx.restore();
}

// A triangle at the level that was left and a line to the one that was taken: down is stronger.
function drawMoves(u, moves) {
  const { ctx, bbox } = u;
  const scale = window.devicePixelRatio || 1;
  ctx.save();
  ctx.strokeStyle = color('mark');
  ctx.fillStyle = color('mark');
  ctx.lineWidth = scale;
  for (const move of moves) {
    const x = u.valToPos(move.unix_ms / 1000, 'x', true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    const y = u.valToPos(move.to_ratio, 'y', true);
    const sign = direction(move) === 'stronger' ? 1 : -1;
    ctx.beginPath();
    ctx.moveTo(x, u.valToPos(move.from_ratio, 'y', true));
    ctx.lineTo(x, y);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(x - 4 * scale, y - sign * 6 * scale);
    ctx.lineTo(x + 4 * scale, y - sign * 6 * scale);
    ctx.lineTo(x, y);
    ctx.fill();
  }
  ctx.restore();
}

export class KvCharts {
  constructor(Library, find, select) {
    this.select = select;
    this.movesPanel = find('moves');
    this.list = this.movesPanel.querySelector('.moves');
    this.empty = this.movesPanel.querySelector('.empty');
    this.note = this.movesPanel.querySelector('.panel-note');
    this.shape = '';
    this.moves = [];
    const common = { rightPadding: 52, legend: false, height: 172 };
    this.use = new LineChart(Library, find('kv-use'), [], (value) => this.#format(value), {
      ...common,
      axisWidth: 64,
      tick: (value) => (this.stage === null ? percentTick(value) : bytes(value)),
      steps: () => (this.stage === null ? decimalSteps(-5, 0) : binarySteps()),
      onDraw: (u) => this.named && drawEndLabels(u, this.useLabels),
    });
    this.level = new LineChart(Library, find('kv-level'), [], percent, {
      ...common,
      axisWidth: 50,
      tick: percentTick,
      onDraw: (u) => {
        if (this.named) drawEndLabels(u, this.levelLabels);
        drawMoves(u, this.moves);
      },
    });
    select.addEventListener('change', () => {
      this.shape = '';
      if (this.last) this.update(...this.last);
    });
  }

  #format(value) {
    return this.stage === null ? percent(value) : bytes(value);
  }

  // Another number of stages or another choice: other lines.
  #reshape(stages) {
    const shape = `${stages.length}/${this.select.value}`;
    if (shape === this.shape) return;
    this.shape = shape;
    const options = ['all', ...stages.map((stage) => String(stage.stage))];
    if (this.select.options.length !== options.length) {
      const chosen = this.select.value;
      this.select.replaceChildren(...options.map((value) => (
        make('option', { value }, value === 'all' ? 'All stages' : `Stage ${value}`))));
      this.select.value = options.includes(chosen) ? chosen : 'all';
      this.shape = `${stages.length}/${this.select.value}`;
    }
    this.stage = this.select.value === 'all' ? null : Number(this.select.value);
    const shown = this.#shown(stages);
    this.named = shown.length <= MAX_NAMED;
    this.level.setSeries(stageSeries(shown, true));
    this.levelLabels = shown.map((stage) => `stage ${stage.stage}`);
    if (this.stage === null) {
      this.use.setSeries(stageSeries(shown, false));
      this.useLabels = this.levelLabels;
    } else {
      this.use.setSeries([
        { label: 'Used', color: 'line-strong', fill: 'line-fill', width: 1.75 },
        { label: 'Promised', color: 'line-soft', dash: [4, 3] },
        { label: 'Budget', color: 'line-alert', dash: [2, 3] },
        { label: 'Pool', color: 'mark', width: 1 }]);
      this.useLabels = ['used', 'promised', 'budget', 'pool'];
    }
  }

  #shown(stages) {
    return stages.filter((stage) => this.stage === null || stage.stage === this.stage);
  }

  update(state, history, windowSeconds) {
    this.last = [state, history, windowSeconds];
    this.#reshape(state.stages);
    this.moves = listMoves(state.balancer?.moves, this.stage, MAX_LISTED);
    const { time } = history.columns;
    const chosen = state.stages.map((stage, i) => ({ stage, columns: history.stages[i] }))
      .filter(({ stage }) => this.stage === null || stage.stage === this.stage);
    const useColumns = this.stage === null
      ? chosen.map(({ columns }) => shares(columns.used, columns.capacity))
      : ['used', 'committed', 'budget', 'capacity'].map((name) => chosen[0].columns[name]);
    this.use.update(time, useColumns, windowSeconds);
    this.level.update(time, chosen.map(({ columns }) => columns.level), windowSeconds);
    this.#list(state);
  }

  #list(state) {
    const { balancer } = state;
    setText(this.note, balancer?.enabled
      ? `${balancer.plans} plans in ${balancer.rounds} rounds` : 'the balancer is off');
    this.empty.hidden = this.moves.length > 0;
    fillList(this.list, this.moves, () => make('li', {}, make('i'), make('time'), make('b'), make('p')),
      (node, move) => {
        const how = direction(move);
        setText(node.children[0], how === 'stronger' ? '▼' : '▲');
        setAttribute(node.children[0], 'title', how === 'stronger' ? 'compresses harder' : 'compresses less');
        setAttribute(node.children[0], 'aria-label', how === 'stronger' ? 'compresses harder' : 'compresses less');
        setAttribute(node.children[0], 'role', 'img');
        setText(node.children[1], clock(move.unix_ms));
        setText(node.children[2], `Stage ${move.stage}: ${percent(move.from_ratio)} → ${percent(move.to_ratio)}`);
        setText(node.children[3], move.reason ?? '');
      });
  }

  redraw() {
    this.use.redraw();
    this.level.redraw();
  }
}
