// The table behind a picture: a button shows it in the picture's place.

import { fillList, make, setText } from './dom.js';

// `panel` has a .panel-tools and a .picture; columns: [{ label, numeric }].
export class TableBehind {
  constructor(panel, picture, columns, caption) {
    this.columns = columns;
    this.picture = picture;
    this.open = false;
    this.body = make('tbody');
    const head = make('tr', {}, ...columns.map((column) => (
      make(column.numeric ? 'th.number' : 'th', { scope: 'col' }, column.label))));
    const id = `table-${caption.replace(/\W+/g, '-').toLowerCase()}`;
    this.scroller = make('div.table-behind', { id, hidden: true, tabindex: '0', role: 'region', 'aria-label': caption },
      make('table', {}, make('caption.visually-hidden', {}, caption), make('thead', {}, head), this.body));
    this.button = make('button.quiet', {
      type: 'button', 'aria-expanded': 'false', 'aria-controls': id, click: () => this.toggle(),
    }, 'Table', make('span.visually-hidden', {}, ` of ${caption}`));
    panel.querySelector('.panel-tools').append(this.button);
    picture.after(this.scroller);
    this.onOpen = () => {};
  }

  toggle() {
    this.open = !this.open;
    this.scroller.hidden = !this.open;
    this.picture.hidden = this.open;
    this.button.setAttribute('aria-expanded', String(this.open));
    this.button.firstChild.textContent = this.open ? 'Picture' : 'Table';
    this.onOpen();
    this.#fill();
  }

  // makeRows(): arrays of texts. Costs nothing while the table is closed.
  update(makeRows) {
    this.makeRows = makeRows;
    this.#fill();
  }

  #fill() {
    if (!this.open || !this.makeRows) return;
    fillList(this.body, this.makeRows(), () => {
      const row = make('tr');
      this.columns.forEach((column, i) => row.append(i === 0
        ? make('th', { scope: 'row' }) : make(column.numeric ? 'td.number' : 'td')));
      return row;
    }, (row, cells) => cells.forEach((text, i) => setText(row.children[i], text)));
  }
}
