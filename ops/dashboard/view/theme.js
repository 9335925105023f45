// Light, dark, or as the system says; what was chosen is remembered.

const STORE = 'spindle-theme';
const ORDER = ['system', 'light', 'dark'];

function remembered() {
  try {
    const value = localStorage.getItem(STORE);
    return ORDER.includes(value) ? value : 'system';
  } catch {
    return 'system';
  }
}

export class Theme {
  constructor(button, onChange) {
    this.button = button;
    this.onChange = onChange;
    this.choice = remembered();
    this.#apply();
    button.addEventListener('click', () => {
      this.choice = ORDER[(ORDER.indexOf(this.choice) + 1) % ORDER.length];
      try { localStorage.setItem(STORE, this.choice); } catch { /* then it is not remembered */ }
      this.#apply();
      this.onChange();
    });
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => this.onChange());
  }

  #apply() {
    const root = document.documentElement;
    if (this.choice === 'system') root.removeAttribute('data-theme');
    else root.setAttribute('data-theme', this.choice);
    const name = { system: 'Auto', light: 'Light', dark: 'Dark' }[this.choice];
    this.button.textContent = name;
    this.button.setAttribute('aria-label', `Colours: ${name}. Press to change.`);
  }
}
