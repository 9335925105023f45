// Running and waiting requests, each with its progress and a button that cancels it.

import { count, duration, plural } from '../logic/format.js';
import { arrangeRows, progress } from '../logic/requests.js';
import { fillList, make, setAttribute, setShare, setText } from './dom.js';

// A first press only asks; it is forgotten after this long.
const CONFIRM_MS = 4000;

export class Requests {
  // cancel(id): resolves to { ok, message }.
  constructor(panel, cancel, say) {
    this.body = panel.querySelector('tbody');
    this.note = panel.querySelector('.panel-note');
    this.empty = panel.querySelector('.empty');
    this.scroller = panel.querySelector('.scroller');
    this.cancel = cancel;
    this.say = say;
    this.rows = [];
    this.pending = new Map();  // id to 'confirm' or 'sent'
    this.body.addEventListener('click', (event) => {
      const button = event.target.closest('button');
      if (button) this.#press(button.dataset.id);
    });
  }

  // While somebody points at the rows or is in them, they must not move.
  #held() {
    return this.body.matches(':hover') || this.body.contains(document.activeElement);
  }

  update(state) {
    const requests = state.active_requests ?? [];
    this.rows = arrangeRows(this.rows, requests, this.#held());
    const total = state.active_requests_total ?? requests.length;
    setText(this.note, requests.length < total
      ? `the first ${requests.length} of ${count(total)}`
      : `${count(state.requests.running)} running, ${count(state.requests.waiting)} waiting`);
    this.empty.hidden = this.rows.length > 0;
    for (const id of this.pending.keys()) {
      if (!this.rows.some((row) => row.id === id)) this.pending.delete(id);
    }
    this.#fill();
  }

  #fill() {
    fillList(this.body, this.rows, () => this.#makeRow(), (node, row) => this.#fillRow(node, row));
  }

  #makeRow() {
    return make('tr', {},
      make('th', { scope: 'row' }), make('td.state', {}, make('span')), make('td.policy'), make('td.number.priority'),
      make('td.progress-cell', {}, make('div.progress', { 'aria-hidden': 'true' }, make('i'), make('s')), make('span')),
      make('td.number.age'),
      make('td.action', {}, make('button.quiet.cancel', { type: 'button' })));
  }

  #fillRow(node, row) {
    const { request, ended } = row;
    const done = progress(request);
    const [id, state, policy, priority, cell, age, action] = node.children;
    setText(id, request.id);
    node.classList.toggle('ended', ended);
    const word = ended ? 'ended' : request.state === 'running' ? done.phase : 'waiting';
    setText(state.firstChild, word);
    setAttribute(state.firstChild, 'class', `tag tag-${word}`);
    setText(policy, request.policy || 'server default');
    setText(priority, String(request.priority ?? 0));
    setShare(cell.firstChild.firstChild, 'width', done.fraction);
    setShare(cell.firstChild.lastChild, 'left', done.promptShare);
    setText(cell.lastChild, done.text);
    setText(age, duration(request.age_ms / 1000));
    const button = action.firstChild;
    const pending = this.pending.get(row.id);
    button.dataset.id = row.id;
    button.disabled = ended || pending === 'sent';
    button.classList.toggle('danger', pending === 'confirm');
    setText(button, pending === 'sent' ? 'Cancelling' : pending === 'confirm' ? 'Really?' : 'Cancel');
    setAttribute(button, 'aria-label', `${pending === 'confirm' ? 'Really cancel' : 'Cancel'} request ${request.id}`);
  }

  async #press(id) {
    const pending = this.pending.get(id);
    if (pending === 'sent') return;
    if (pending !== 'confirm') {
      this.pending.set(id, 'confirm');
      setTimeout(() => {
        if (this.pending.get(id) !== 'confirm') return;
        this.pending.delete(id);
        this.#fill();
      }, CONFIRM_MS);
      this.#fill();
      return;
    }
    this.pending.set(id, 'sent');
    this.#fill();
    const result = await this.cancel(id);
    if (!result.ok) this.pending.delete(id);
    this.say(result.message);
    this.#fill();
  }
}

export function counters(requests) {
  return [
    ['Finished', requests.finished], ['Failed', requests.failed], ['Cancelled', requests.cancelled],
    ['Refused', requests.refused], ['Expired', requests.expired], ['Preempted', requests.preemptions],
  ].map(([label, value]) => `${label} ${count(value ?? 0)}`).join(' · ')
    + ` · ${plural(requests.recomputed_tokens ?? 0, 'token')} recomputed`;
}
