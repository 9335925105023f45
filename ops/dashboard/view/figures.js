// The line of figures at the top, and the names beside the title.

import { bytes, count, duration, percent, rate, seconds } from '../logic/format.js';
import { kvShares } from '../logic/stages.js';
import { fillList, make, setText } from './dom.js';

function newest(column) {
  return column.length > 0 ? column[column.length - 1] ?? NaN : NaN;
}

// [{ label, value, unit, note }]
export function figures(state, columns) {
  const fullest = state.stages.reduce((best, stage) => {
    const { committed, used } = kvShares(stage);
    const share = Math.max(committed, used);
    return share > best.share ? { share, stage: stage.stage } : best;
  }, { share: 0, stage: 0 });
  const used = state.stages.reduce((sum, stage) => sum + stage.kv_used_bytes, 0);
  return [
    { label: 'Running', value: count(state.requests.running), note: state.max_num_seqs ? `of at most ${state.max_num_seqs}` : '' },
    { label: 'Waiting', value: count(state.requests.waiting), note: `${count(state.requests.waiting_prompt_tokens)} prompt tokens` },
    { label: 'Generated', value: rate(newest(columns.generation)), unit: 'tok/s', note: `${count(state.generation_tokens)} in all` },
    { label: 'Prompt', value: rate(newest(columns.prompt)), unit: 'tok/s', note: `${count(state.prompt_tokens)} in all` },
    { label: 'First token p95', value: seconds(newest(columns.ttft95)), note: `p50 ${seconds(newest(columns.ttft50))}` },
    { label: 'Between tokens p95', value: seconds(newest(columns.itl95)), note: `p50 ${seconds(newest(columns.itl50))}` },
    { label: 'KV promised', value: percent(fullest.share), note: `on stage ${fullest.stage}, the fullest` },
    { label: 'KV held', value: bytes(used), note: `on ${state.stages.length} stage${state.stages.length === 1 ? '' : 's'}` },
  ];
}

export class Figures {
  constructor(list, names) {
    this.list = list;
    this.names = names;
  }

  update(state, columns) {
    fillList(this.list, figures(state, columns), () => make('div', {},
      make('dt'), make('dd', {}, make('b'), make('span')), make('dd.note')), (node, figure) => {
      setText(node.children[0], figure.label);
      setText(node.children[1].firstChild, figure.value);
      setText(node.children[1].lastChild, figure.unit ?? '');
      setText(node.children[2], figure.note);
    });
    setText(this.names, `${state.model} · version ${state.version} · up ${duration(state.uptime_seconds)}`
      + ` · context ${count(state.max_model_len)}`);
  }
}
