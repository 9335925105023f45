// Puts the parts together: states come in, the page shows them once per frame.

import { Connection } from './connection.js';
import { conditions, linkLabel } from './logic/health.js';
import { History } from './logic/history.js';
import { silentStages } from './logic/stages.js';
import { Banner, Messages } from './view/banner.js';
import { forgetColors, setAttribute, setText } from './view/dom.js';
import { Figures } from './view/figures.js';
import { HeatMap } from './view/heatmap.js';
import { KeyDialog } from './view/key_dialog.js';
import { KvCharts } from './view/kv_charts.js';
import { loadChartLibrary } from './view/line_chart.js';
import { Pipeline } from './view/pipeline.js';
import { counters, Requests } from './view/requests.js';
import { ServiceCharts } from './view/service_charts.js';
import { Theme } from './view/theme.js';

const SILENT_SECONDS = 10;
const MEASURE = 'spindle-render';

const find = (id) => document.getElementById(id);
const Library = await loadChartLibrary();

const history = new History();
const track = new Map();
const messages = new Messages(find('messages'));
const keys = new KeyDialog(find('key-dialog'));
const figures = new Figures(find('figures'), find('names'));
const pipeline = new Pipeline(find('pipeline'));
const heat = new HeatMap(find('layers'));
const kv = new KvCharts(Library, find, find('kv-stage'));
const service = new ServiceCharts(Library, find);
const requests = new Requests(find('requests'), cancelRequest, (text) => messages.say(text));
const windowSelect = find('window');
let state = null;
let silent = [];
let receivedAt = 0;
let frame = 0;

const connection = new Connection((newState, at) => {
  state = newState;
  receivedAt = at;
  if (history.add(state)) track.clear();
  silent = silentStages(track, state.stages, state.unix_ms, SILENT_SECONDS);
  schedule();
}, () => showLink());
const banner = new Banner(find('conditions'), () => connection.retry());
new Theme(find('theme'), () => {
  forgetColors();
  heat.themeChanged();
  kv.redraw();
  service.redraw();
});

function schedule() {
  // A page that nobody sees only remembers.
  if (frame === 0 && !document.hidden) frame = requestAnimationFrame(render);
}

function render() {
  frame = 0;
  if (!state) return;
  const seconds = Number(windowSelect.value);
  document.body.classList.remove('blank');
  figures.update(state, history.columns);
  pipeline.update(state, history.shares, silent);
  heat.update(state);
  kv.update(state, history, seconds);
  service.update(history, seconds);
  requests.update(state);
  setText(find('counters'), counters(state.requests));
  showLink();
  // The next frame begins once this one is on the screen.
  const from = receivedAt;
  requestAnimationFrame(() => {
    performance.clearMeasures(MEASURE);
    performance.measure(MEASURE, { start: from, end: performance.now() });
  });
}

function showLink() {
  const { link } = connection;
  setText(find('link-text'), linkLabel(link, Date.now()));
  setAttribute(find('link'), 'data-state', link.state);
  document.body.classList.toggle('stale', link.state === 'lost' && state !== null);
  banner.update(conditions(link, state, silent));
}

async function cancelRequest(id) {
  let { key } = keys;
  for (let asked = 0; ; asked += 1) {
    const { status } = await connection.cancel(id, key);
    if (status === 202 || status === 200) return { ok: true, message: `Request ${id} is being cancelled.` };
    if (status === 404) return { ok: false, message: `Request ${id} has already ended.` };
    if (status === 0) return { ok: false, message: 'The server does not answer.' };
    if (status !== 401 && status !== 403) return { ok: false, message: `The server answered ${status}.` };
    if (key) keys.forget();
    key = await keys.ask(asked > 0 || key ? 'The server does not know this key.' : 'Cancelling needs the server\'s API key.');
    if (!key) return { ok: false, message: `Request ${id} was not cancelled: no key.` };
  }
}

windowSelect.addEventListener('change', schedule);
document.addEventListener('visibilitychange', schedule);
// The countdown.
setInterval(() => { if (connection.link.state !== 'live') showLink(); }, 500);
connection.start();
