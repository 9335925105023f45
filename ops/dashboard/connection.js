// The link to the server: an event stream that is opened again, after growing pauses, whenever it
// ends or falls silent.

import { backoffMs } from './logic/health.js';

const EVENTS = new URL('../v1/spindle/events', import.meta.url);
const STATE = new URL('../v1/spindle/state', import.meta.url);
const CANCEL = (id) => new URL(`../v1/spindle/requests/${encodeURIComponent(id)}/cancel`, import.meta.url);
// A state is due every second.
const SILENCE_MS = 6000;
const ASK_MS = 3000;
const CANCEL_MS = 10000;

export class Connection {
  // onState(state, receivedAt), receivedAt of performance.now(); onLink(): `link` has changed.
  constructor(onState, onLink) {
    this.onState = onState;
    this.onLink = onLink;
    this.link = { state: 'connecting', retryAtMs: 0 };
    this.attempt = 0;
    this.received = 0;  // states of streams
  }

  start() {
    this.#open();
    const wake = () => {
      if (this.link.state === 'lost' && !document.hidden) this.retry();
    };
    document.addEventListener('visibilitychange', wake);
    addEventListener('online', wake);
  }

  retry() {
    clearTimeout(this.timer);
    this.attempt = 0;
    this.#open();
  }

  #open() {
    this.#close();
    const source = new EventSource(EVENTS);
    this.source = source;
    source.addEventListener('state', (event) => this.#receive(event.data));
    source.addEventListener('error', () => this.#lost());
    this.#watch();
  }

  #close() {
    this.source?.close();
    this.source = null;
    clearTimeout(this.silence);
  }

  #watch() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.#lost(), SILENCE_MS);
  }

  #set(link) {
    this.link = link;
    this.onLink();
  }

  #receive(text) {
    const receivedAt = performance.now();
    let state;
    try {
      state = JSON.parse(text);
    } catch {
      return;  // not ours; silence will tell
    }
    this.attempt = 0;
    this.received += 1;
    this.#watch();
    if (this.link.state !== 'live') this.#set({ state: 'live', retryAtMs: 0 });
    this.onState(state, receivedAt);
  }

  // The stream has ended or was refused. When the server still answers, it has no stream left for us.
  async #lost() {
    this.#close();
    const wait = backoffMs(this.attempt, Math.random());
    this.attempt += 1;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#open(), wait);
    const retryAtMs = Date.now() + wait;
    const before = this.received;
    const state = await this.#ask();
    if (this.received !== before) return;  // it has come back meanwhile
    this.#set({ state: state ? 'polling' : 'lost', retryAtMs });
    if (state) this.onState(state, performance.now());
  }

  // The state, or null without an answer.
  async #ask() {
    try {
      const response = await fetch(STATE, { signal: AbortSignal.timeout(ASK_MS), cache: 'no-store' });
      return response.ok ? await response.json() : null;
    } catch {
      return null;
    }
  }

  // { status }: 0 when there was no answer.
  async cancel(id, key) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    try {
      const response = await fetch(CANCEL(id), {
        method: 'POST', headers, signal: AbortSignal.timeout(CANCEL_MS),
      });
      return { status: response.status };
    } catch {
      return { status: 0 };
    }
  }
}
