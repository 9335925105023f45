// Elements without HTML: text from the server is only ever text.

import { pickScheme } from '../logic/colors.js';

// make('button.quiet', { type: 'button', click: close }, 'Close'): tag and classes, attributes
// (functions become listeners), children.
export function make(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split('.');
  const node = document.createElement(tag);
  if (classes.length > 0) node.className = classes.join(' ');
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Only what changes is touched: 64 stages are updated every second.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function setShare(node, property, share) {
  const text = `${(Math.min(1, Math.max(0, share)) * 100).toFixed(2)}%`;
  if (node.style.getPropertyValue(property) !== text) node.style.setProperty(property, text);
}

// Keeps as many children of `parent` as there are items, each made by make() and filled by fill(node, item, i).
export function fillList(parent, items, makeItem, fill) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  while (parent.children.length < items.length) parent.append(makeItem());
  items.forEach((item, i) => fill(parent.children[i], item, i));
}

const colors = new Map();

// A colour of the style sheet, for canvases; forgetColors() when the theme has changed.
export function color(name) {
  let value = colors.get(name);
  if (value === undefined) {
    const style = getComputedStyle(document.documentElement);
    const scheme = style.colorScheme.includes('dark') ? 'dark' : 'light';
    value = pickScheme(style.getPropertyValue(`--${name}`), scheme);
    colors.set(name, value);
  }
  return value;
}

export function forgetColors() {
  colors.clear();
}
