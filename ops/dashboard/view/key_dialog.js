// Asks for the API key. It stays in this tab's session storage and is sent to this server only.

const STORE = 'spindle-api-key';

function stored() {
  try { return sessionStorage.getItem(STORE) ?? ''; } catch { return ''; }
}

function store(key) {
  try {
    if (key) sessionStorage.setItem(STORE, key); else sessionStorage.removeItem(STORE);
  } catch { /* storage is off: the key lives until the page is closed */ }
}

export class KeyDialog {
  constructor(dialog) {
    this.dialog = dialog;
    this.field = dialog.querySelector('input');
    this.message = dialog.querySelector('.dialog-message');
    this.key = stored();
    dialog.querySelector('form').addEventListener('submit', (event) => {
      event.preventDefault();
      this.#close(this.field.value.trim() || null);
    });
    dialog.querySelector('.dialog-cancel').addEventListener('click', () => this.#close(null));
    dialog.addEventListener('cancel', (event) => {
      event.preventDefault();
      this.#close(null);
    });
  }

  #close(key) {
    this.dialog.close();
    this.field.value = '';
    if (key) {
      this.key = key;
      store(key);
    }
    this.resolve?.(key);
    this.resolve = null;
  }

  // The key, or null when the reader does not give one.
  ask(message) {
    this.resolve?.(null);
    this.message.textContent = message;
    this.dialog.showModal();
    this.field.focus();
    return new Promise((resolve) => { this.resolve = resolve; });
  }

  forget() {
    this.key = '';
    store('');
  }
}
