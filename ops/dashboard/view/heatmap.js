// The panel of layers and their KV: the picture, its legend, a line about the layer pointed at, and
// the table.

import { bytes, count, percent, plural } from '../logic/format.js';
import { cellAt, layout, neighbour } from '../logic/heat.js';
import { CODECS, keptShare, MODES, parsePlan, planTotals } from '../logic/plans.js';
import { fillList, make, setAttribute, setText } from './dom.js';
import { paint, readColors } from './heat_picture.js';
import { TableBehind } from './table.js';

const MAX_HEIGHT = 300;

function describe(stage, layer) {
  const share = keptShare(layer);
  const tokens = layer.logical_tokens > 0
    ? `, ${count(layer.retained_tokens)} of ${plural(layer.logical_tokens, 'token')}` : '';
  if (share === null) return `Layer ${layer.layer}, stage ${stage.stage}: nothing held`;
  return `Layer ${layer.layer}, stage ${stage.stage}: ${layer.plan || 'no plan'}, ${bytes(layer.used_bytes)} kept of `
    + `${bytes(layer.full_bytes)} (${percent(share)})${tokens}`;
}

export class HeatMap {
  constructor(panel) {
    this.canvas = panel.querySelector('canvas');
    this.frame = panel.querySelector('.heat-picture');
    this.detail = panel.querySelector('.heat-detail');
    this.spoken = panel.querySelector('.heat-spoken');  // read aloud: when the cursor moves only
    this.legend = panel.querySelector('.heat-legend');
    this.note = panel.querySelector('.panel-note');
    this.cursor = -1;
    this.state = null;
    this.colors = readColors();
    this.table = new TableBehind(panel, this.frame, [
      { label: 'Layer' }, { label: 'Stage' }, { label: 'Plan' }, { label: 'Full', numeric: true },
      { label: 'Kept', numeric: true }, { label: 'Share', numeric: true },
      { label: 'Tokens', numeric: true }, { label: 'Retained', numeric: true }], 'KV by layer');
    this.canvas.addEventListener('pointermove', (event) => {
      if (this.picture) this.#point(cellAt(this.picture, event.offsetX, event.offsetY));
    });
    this.canvas.addEventListener('pointerleave', () => {
      if (document.activeElement !== this.canvas) this.#point(-1);
    });
    this.canvas.addEventListener('focus', () => {
      if (this.cursor < 0 && this.picture?.total > 0) this.#point(0);
    });
    this.canvas.addEventListener('blur', () => this.#point(-1));
    this.canvas.addEventListener('keydown', (event) => {
      if (!this.picture || this.picture.total === 0) return;
      const to = neighbour(this.picture, Math.max(0, this.cursor), event.key);
      if (to === this.cursor && !event.key.startsWith('Arrow')) return;
      event.preventDefault();
      this.#point(to);
      setText(this.spoken, this.detail.textContent);
    });
    new ResizeObserver(() => this.state && this.update(this.state)).observe(this.frame);
  }

  themeChanged() {
    this.colors = readColors();
    if (this.state) this.#draw();
  }

  update(state) {
    this.state = state;
    if (!state) return;
    this.layers = state.stages.flatMap((stage) => stage.layers ?? []);
    const totals = planTotals(state.stages);
    this.#legend(totals);
    this.#draw();
    this.#detail();
    this.table.update(() => state.stages.flatMap((stage) => (stage.layers ?? []).map((layer) => [
      String(layer.layer), String(stage.stage), layer.plan || '–', bytes(layer.full_bytes),
      bytes(layer.used_bytes), percent(keptShare(layer) ?? NaN), count(layer.logical_tokens),
      count(layer.retained_tokens)])));
  }

  #legend(totals) {
    const used = totals.reduce((sum, entry) => sum + entry.used, 0);
    const full = totals.reduce((sum, entry) => sum + entry.full, 0);
    setText(this.note, full > 0
      ? `${bytes(used)} kept of ${bytes(full)} (${percent(used / full)})` : 'nothing held at present');
    const known = totals.map((entry) => ({ ...entry, ...parsePlan(entry.plan) }));
    fillList(this.legend, known, () => make('li', {}, make('i.chip'), make('span'), make('b')),
      (node, entry) => {
        setAttribute(node.firstChild, 'class', `chip codec-${entry.codec} mode-${entry.mode}`);
        setText(node.children[1], entry.plan || 'nothing held');
        const codec = CODECS.find((item) => item.key === entry.codec).label;
        const mode = MODES.find((item) => item.key === entry.mode).label;
        setAttribute(node, 'title', entry.plan ? `${codec}, ${mode}` : 'no KV in these layers now');
        setText(node.children[2], `${plural(entry.layers, 'layer')}`
          + (entry.full > 0 ? ` · ${percent(entry.used / entry.full)}` : ''));
      });
    setAttribute(this.canvas, 'aria-label', `KV by layer. ${this.note.textContent}. `
      + known.map((entry) => `${plural(entry.layers, 'layer')}: ${entry.plan || 'nothing held'}`).join('; ')
      + '. Arrow keys move from layer to layer.');
  }

  #draw() {
    const width = this.frame.clientWidth;
    if (width <= 0) return;
    const counts = this.state.stages.map((stage) => (stage.layers ?? []).length);
    this.picture = layout(counts, width, MAX_HEIGHT);
    const scale = window.devicePixelRatio || 1;
    const height = Math.max(20, this.picture.height + 4);
    const context = this.canvas.getContext('2d');
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.canvas.style.height = `${height}px`;
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    paint(context, this.picture, this.state.stages, this.layers, this.colors, this.cursor);
  }

  #point(cell) {
    if (cell === this.cursor) return;
    this.cursor = cell;
    if (!this.state) return;
    this.#draw();
    this.#detail();
  }

  #detail() {
    if (this.cursor < 0 || this.cursor >= this.layers.length) {
      setText(this.detail, 'Point at a layer, or focus the picture and use the arrow keys.');
      return;
    }
    let stage = 0;
    let left = this.cursor;
    while (left >= (this.state.stages[stage].layers ?? []).length) {
      left -= (this.state.stages[stage].layers ?? []).length;
      stage += 1;
    }
    setText(this.detail, describe(this.state.stages[stage], this.layers[this.cursor]));
  }
}
