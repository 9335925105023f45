// Layer plans by name: "FULL raw/raw", "EVICT lloyd2/lloyd2", "STREAM int4/int4 128", "FULL token".
// The codec decides the colour, the mode the pattern: two things that can be told apart without
// seeing colours, because the pattern and the name say them too.

export const CODECS = [
  { key: 'raw', label: '16 bit' },
  { key: 'bits4', label: '4 bit' },
  { key: 'bits3', label: '3 bit' },
  { key: 'bits2', label: '2 bit' },
  { key: 'bits1', label: '1 bit' },
  { key: 'codebook', label: 'codebook' },
  { key: 'token', label: 'token ids' },
  { key: 'other', label: 'other' },
  { key: 'none', label: 'nothing held' },
];
export const MODES = [
  { key: 'full', label: 'all tokens' },
  { key: 'evict', label: 'evicting' },
  { key: 'stream', label: 'window' },
];

function codecKey(format) {
  if (format === 'raw' || format === 'codebook' || format === 'token') return format;
  const bits = /^(?:int|kivi|lloyd)([1-4])$/.exec(format);
  return bits ? `bits${bits[1]}` : 'other';
}

// { mode, codec, label }: keys of the lists above, and the name in few letters for a small place.
export function parsePlan(name) {
  if (!name) return { mode: 'full', codec: 'none', label: '' };
  const words = name.trim().split(/\s+/);
  const mode = MODES.find((entry) => entry.key === words[0].toLowerCase())?.key;
  const formats = (mode ? words[1] ?? '' : words[0]).split('/');
  // The coarser side of K and V decides: it is what the quality hangs on.
  const keys = formats.map(codecKey);
  const codec = keys.includes('other') ? 'other'
    : keys.reduce((coarse, key) => (codecOrder(key) > codecOrder(coarse) ? key : coarse));
  const format = formats.length > 1 && formats[0] === formats[1] ? formats[0] : formats.join('/');
  const prefix = { evict: 'evict ', stream: 'window ' }[mode] ?? '';
  return { mode: mode ?? 'full', codec, label: prefix + format };
}

function codecOrder(key) {
  return CODECS.findIndex((entry) => entry.key === key);
}

// The plans in use, the most layers first: { plan, layers, used, full }.
export function planTotals(stages) {
  const totals = new Map();
  for (const stage of stages) {
    for (const layer of stage.layers ?? []) {
      const plan = layer.plan ?? '';
      const entry = totals.get(plan) ?? { plan, layers: 0, used: 0, full: 0 };
      entry.layers += 1;
      entry.used += layer.used_bytes ?? 0;
      entry.full += layer.full_bytes ?? 0;
      totals.set(plan, entry);
    }
  }
  return [...totals.values()].sort((a, b) => b.layers - a.layers || a.plan.localeCompare(b.plan));
}

// Kept of full, 0 to 1; null when nothing is held.
export function keptShare(layer) {
  return layer.full_bytes > 0 ? Math.min(1, layer.used_bytes / layer.full_bytes) : null;
}
