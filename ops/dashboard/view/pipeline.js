// The pipeline: a box per stage in order, what it did with its time, how full its KV pool is.

import { bytes, layerRange, percent } from '../logic/format.js';
import { kvShares, TIME_PARTS } from '../logic/stages.js';
import { fillList, make, setAttribute, setShare, setText } from './dom.js';
import { TableBehind } from './table.js';

// More stages than this get small boxes.
const COMPACT_FROM = 9;

function makeStage() {
  const parts = TIME_PARTS.map((part) => make(`i.part.${part.key}`));
  const texts = TIME_PARTS.map((part) => make(`span.part-text.${part.key}`, {},
    make('i.swatch'), make('span.part-label', {}, part.label), make('b')));
  const node = make('li.stage', {},
    make('div.stage-head', {}, make('b.stage-name'), make('span.stage-layers', {}, make('span'), make('span'))),
    make('div.stage-place'),
    make('div.time-bar', { 'aria-hidden': 'true' }, ...parts),
    make('div.part-texts', {}, ...texts),
    make('div.kv-bar', { 'aria-hidden': 'true' }, make('i.kv-committed'), make('i.kv-used')),
    make('div.kv-text', {}, make('span'), make('b')));
  node.parts = parts;
  node.texts = texts;
  return node;
}

function fillStage(node, { stage, share, silent }) {
  const find = (selector) => node.querySelector(selector);
  setText(find('.stage-name'), `Stage ${stage.stage}`);
  setText(find('.stage-layers').firstChild, stage.n_layers === 1 ? 'layer ' : 'layers ');
  setText(find('.stage-layers').lastChild, layerRange(stage));
  const place = [stage.host, stage.device].filter(Boolean).join(' · ');
  setText(find('.stage-place'), silent ? `no report for ${Math.floor(silent.seconds)} s` : place);
  setAttribute(find('.stage-place'), 'title', place);
  node.classList.toggle('silent', Boolean(silent));
  TIME_PARTS.forEach((part, i) => {
    const value = share ? share[part.key] : 0;
    setShare(node.parts[i], 'width', value);
    setText(node.texts[i].lastChild, share ? percent(value) : '–');
    setAttribute(node.texts[i], 'title', `${part.label}: ${part.explain}`);
  });
  const kv = kvShares(stage);
  setShare(find('.kv-used'), 'width', kv.used);
  setShare(find('.kv-committed'), 'width', kv.committed);
  node.classList.toggle('tight', kv.committed > 0.95);
  setText(find('.kv-text span'), `KV ${bytes(stage.kv_used_bytes)} of ${bytes(stage.kv_capacity_bytes)}`);
  setText(find('.kv-text b'), percent(kv.used));
}

export class Pipeline {
  constructor(panel) {
    this.list = panel.querySelector('.stages');
    this.note = panel.querySelector('.panel-note');
    this.table = new TableBehind(panel, this.list, [
      { label: 'Stage' }, { label: 'Host' }, { label: 'Device' }, { label: 'Layers' },
      ...TIME_PARTS.map((part) => ({ label: part.label, numeric: true })),
      { label: 'Compress', numeric: true }, { label: 'Transfer', numeric: true },
      { label: 'Weights', numeric: true }, { label: 'KV used', numeric: true },
      { label: 'KV promised', numeric: true }, { label: 'KV budget', numeric: true },
      { label: 'KV peak', numeric: true },
      { label: 'KV pool', numeric: true }, { label: 'Steps', numeric: true }], 'Stages');
  }

  update(state, shares, silent) {
    const { stages } = state;
    const silentOf = new Map(silent.map((entry) => [entry.stage, entry]));
    this.list.classList.toggle('compact', stages.length >= COMPACT_FROM);
    fillList(this.list, stages.map((stage, i) => (
      { stage, share: shares[i], silent: silentOf.get(stage.stage) })), makeStage, fillStage);
    setText(this.note, busyNote(shares));
    this.table.update(() => stages.map((stage, i) => {
      const share = shares[i];
      return [String(stage.stage), stage.host, stage.device, layerRange(stage),
        ...TIME_PARTS.map((part) => (share ? percent(share[part.key]) : '–')),
        share ? percent(share.compress) : '–', share ? percent(share.transfer) : '–',
        bytes(stage.weight_bytes), bytes(stage.kv_used_bytes), bytes(stage.kv_committed_bytes),
        bytes(stage.kv_budget_bytes), bytes(stage.kv_peak_bytes), bytes(stage.kv_capacity_bytes), String(stage.steps)];
    }));
  }
}

// "busy 61% on average": one sentence for those who cannot see the bars.
function busyNote(shares) {
  const known = shares.filter((share) => share !== null);
  if (known.length === 0) return '';
  const mean = (key) => known.reduce((sum, share) => sum + share[key], 0) / known.length;
  return `busy ${percent(mean('busy'))} on average over the last seconds`;
}
