// What must be known first, and short messages. Both are announced to screen readers.

import { fillList, make, setAttribute, setText } from './dom.js';

const MESSAGE_MS = 6000;

export class Banner {
  constructor(region, onRetry) {
    this.list = region;
    this.onRetry = onRetry;
  }

  update(conditions) {
    fillList(this.list, conditions, () => make('li', {},
      make('i', { 'aria-hidden': 'true' }), make('b'), make('span'),
      make('button.quiet', { type: 'button', click: () => this.onRetry() }, 'Try now')),
    (node, condition) => {
      setAttribute(node, 'class', condition.level);
      setText(node.children[0], condition.level === 'bad' ? '●' : '▲');
      setText(node.children[1], condition.title);
      setText(node.children[2], condition.detail);
      node.children[3].hidden = condition.title !== 'Disconnected';
    });
  }
}

export class Messages {
  constructor(region) {
    this.region = region;
  }

  say(text) {
    const node = make('p', {}, text);
    this.region.append(node);
    setTimeout(() => node.remove(), MESSAGE_MS);
  }
}
