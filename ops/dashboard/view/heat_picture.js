// Paints the layer picture. A cell's colour is the codec of the layer's plan, its pattern the mode,
// and its filled part, from below, the bytes kept of those of the full cache.

import { percent } from '../logic/format.js';
import { cellRect } from '../logic/heat.js';
import { keptShare, parsePlan } from '../logic/plans.js';
import { color } from './dom.js';

// Lower cells show the kept share by strength of colour instead of by a level.
const FILL_FROM = 12;
const FONT = 'ui-sans-serif, system-ui, sans-serif';

export function readColors() {
  const names = ['raw', 'bits4', 'bits3', 'bits2', 'bits1', 'codebook', 'token', 'other', 'none'];
  return {
    codecs: Object.fromEntries(names.map((name) => [name, color(`codec-${name}`)])),
    well: color('well'),
    text: color('text'),
    soft: color('text-soft'),
    faint: color('text-faint'),
    surface: color('surface'),
    focus: color('focus'),
    mark: color('pattern'),
  };
}

// Lines across the filled part: diagonal for evicting plans, upright for windows.
function pattern(context, mode, rect, fill, stroke) {
  if (mode === 'full' || rect.width < 8) return;
  context.save();
  context.beginPath();
  context.rect(rect.x, rect.y + rect.height - fill, rect.width, fill);
  context.clip();
  context.strokeStyle = stroke;
  context.lineWidth = 1;
  context.beginPath();
  const step = rect.width > 40 ? 7 : 5;
  if (mode === 'evict') {
    for (let x = -rect.height; x < rect.width; x += step) {
      context.moveTo(rect.x + x, rect.y + rect.height);
      context.lineTo(rect.x + x + rect.height, rect.y);
    }
  } else {
    for (let x = step / 2; x < rect.width; x += step) {
      context.moveTo(Math.round(rect.x + x) + 0.5, rect.y);
      context.lineTo(Math.round(rect.x + x) + 0.5, rect.y + rect.height);
    }
  }
  context.stroke();
  context.restore();
}

function cellText(context, rect, layer, plan, share, colors) {
  context.fillStyle = colors.text;
  context.textBaseline = 'alphabetic';
  if (rect.width >= 52 && rect.height >= 66) {
    context.font = `600 13px ${FONT}`;
    context.fillText(share === null ? '–' : percent(share), rect.x + 7, rect.y + 33);
    context.font = `11px ${FONT}`;
    context.fillStyle = colors.soft;
    context.fillText(String(layer.layer), rect.x + 7, rect.y + 16);
    context.fillStyle = colors.text;
    const words = context.measureText(plan.label).width > rect.width - 10 ? plan.label.split(' ') : [plan.label];
    words.forEach((word, i) => context.fillText(word, rect.x + 7, rect.y + 48 + 13 * i, rect.width - 9));
  } else if (rect.width >= 42 && rect.height >= 34) {
    context.fillStyle = colors.faint;
    context.font = `10px ${FONT}`;
    context.fillText(String(layer.layer), rect.x + 5, rect.y + 12);
    context.fillStyle = colors.text;
    context.font = `600 12px ${FONT}`;
    context.fillText(share === null ? '–' : percent(share), rect.x + 5, rect.y + 27);
  } else if (rect.width >= 26 && rect.height >= 18) {
    context.font = `10px ${FONT}`;
    context.fillText(String(layer.layer), rect.x + 4, rect.y + 12);
  }
}

// layers: all stages' layers in order; stages: for the labels.
export function paint(context, picture, stages, layers, colors, cursor) {
  context.font = `11px ${FONT}`;
  context.textBaseline = 'alphabetic';
  context.fillStyle = colors.faint;
  for (const group of picture.groups) {
    const short = picture.inLines || group.width < 90;
    const text = `${short ? 'S' : 'Stage '}${stages[group.index].stage}`;
    // Thin lines have room for every second or third name only.
    const every = picture.inLines ? Math.ceil(12 / (picture.size.height + picture.size.gap)) : 1;
    if (group.index % every === 0) context.fillText(text, group.x, group.y + (picture.inLines ? 8 : 12));
  }
  const plans = new Map();
  for (let i = 0; i < layers.length; i += 1) {
    const layer = layers[i];
    const rect = cellRect(picture, i);
    let plan = plans.get(layer.plan);
    if (!plan) plans.set(layer.plan, plan = parsePlan(layer.plan));
    const share = keptShare(layer);
    context.fillStyle = colors.well;
    context.fillRect(rect.x, rect.y, rect.width, rect.height);
    if (share !== null && rect.height < FILL_FROM) {
      context.globalAlpha = 0.3 + 0.7 * share;
      context.fillStyle = colors.codecs[plan.codec];
      context.fillRect(rect.x, rect.y, rect.width, rect.height);
      context.globalAlpha = 1;
    } else if (share !== null) {
      // What is kept is never so little that it cannot be seen.
      const fill = Math.max(rect.height >= 20 ? 3 : 2, Math.round(rect.height * share));
      context.fillStyle = colors.codecs[plan.codec];
      context.fillRect(rect.x, rect.y + rect.height - fill, rect.width, fill);
      pattern(context, plan.mode, rect, fill, colors.mark);
    }
    cellText(context, rect, layer, plan, share, colors);
  }
  if (cursor >= 0 && cursor < layers.length) {
    const rect = cellRect(picture, cursor);
    context.strokeStyle = colors.focus;
    context.lineWidth = 2;
    context.strokeRect(rect.x - 1, rect.y - 1, rect.width + 2, rect.height + 2);
  }
}
