// Numbers as text. What is not a number is a dash, never "NaN".

const MISSING = '–';
const GROUPED = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });

// Three digits that matter: 0.123, 1.23, 12.3, 123.
function short(value) {
  const size = Math.abs(value);
  if (size >= 99.95) return value.toFixed(0);
  if (size >= 9.995) return value.toFixed(1);
  return value.toFixed(2);
}

export function count(value) {
  if (!Number.isFinite(value)) return MISSING;
  if (Math.abs(value) < 100000) return GROUPED.format(value);
  for (const [size, unit] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (Math.abs(value) >= size) return short(value / size) + unit;
  }
  return MISSING;
}

export function rate(value) {
  if (!Number.isFinite(value)) return MISSING;
  if (value === 0) return '0';
  return Math.abs(value) < 100 ? short(value) : count(value);
}

export function bytes(value) {
  if (!Number.isFinite(value)) return MISSING;
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let unit = 0;
  let scaled = value;
  while (Math.abs(scaled) >= 1000 && unit < units.length - 1) {
    scaled /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${scaled.toFixed(0)} B` : `${short(scaled)} ${units[unit]}`;
}

export function percent(share) {
  if (!Number.isFinite(share)) return MISSING;
  const value = share * 100;
  if (value > 0 && value < 0.1) return '<0.1%';
  return `${value < 9.95 && value > 0 ? value.toFixed(1) : value.toFixed(0)}%`;
}

// At an axis, where 0.25% must not become 0.3%.
export function percentTick(share) {
  if (!Number.isFinite(share)) return MISSING;
  return `${Number((share * 100).toFixed(3))}%`;
}

// A latency.
export function seconds(value) {
  if (!Number.isFinite(value)) return MISSING;
  if (value === 0) return '0';
  if (value < 0.001) return `${short(value * 1e6)} µs`;
  if (value < 1) return `${short(value * 1000)} ms`;
  return value < 120 ? `${short(value)} s` : duration(value);
}

// At an axis: "50 ms" instead of "50.0 ms".
export function secondsTick(value) {
  return seconds(value).replace(/(\.\d*?)0+ /, '$1 ').replace('. ', ' ');
}

// A length of time that a person waits.
export function duration(value) {
  if (!Number.isFinite(value)) return MISSING;
  const whole = Math.max(0, Math.floor(value));
  const days = Math.floor(whole / 86400);
  const hours = Math.floor(whole / 3600) % 24;
  const minutes = Math.floor(whole / 60) % 60;
  if (days > 0) return `${days} d ${hours} h`;
  if (hours > 0) return `${hours} h ${minutes} min`;
  if (minutes > 0) return `${minutes} min ${whole % 60} s`;
  return `${whole} s`;
}

// HH:MM:SS of the reader's clock.
export function clock(unixMs) {
  if (!Number.isFinite(unixMs)) return MISSING;
  const date = new Date(unixMs);
  return [date.getHours(), date.getMinutes(), date.getSeconds()]
    .map((part) => String(part).padStart(2, '0')).join(':');
}

// "3", "3–5", of a stage's layers.
export function layerRange(stage) {
  const first = stage.first_layer;
  const last = first + stage.n_layers - 1;
  if (stage.n_layers <= 0) return 'none';
  return first === last ? `${first}` : `${first}–${last}`;
}

export function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? '' : 's'}`;
}
