// One browser page that does what it is told: a command per line of standard input, as JSON, an
// answer per line of standard output. dashboard_test.py is at the other end.
//
// Exits with 77, and says why, when there is no browser or no playwright-core here.

import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import process from 'node:process';
import { createInterface } from 'node:readline';

const require = createRequire(new URL('../../npm/package.json', import.meta.url));
const NAMES = ['chromium', 'google-chrome', 'google-chrome-stable', 'chrome'];
const COMMAND_MS = 20_000;

function skip(reason) {
  console.error(`skipped: ${reason}`);
  process.exit(77);
}

// Ubuntu's /usr/bin/chromium-browser is a stub that asks for a snap; it is none of these names.
function findBrowser() {
  for (const folder of (process.env.PATH ?? '').split(':')) {
    for (const name of NAMES) {
      const file = path.join(folder, name);
      if (existsSync(file)) return file;
    }
  }
  return null;
}

let chromium;
let axeSource;
try {
  ({ chromium } = require('playwright-core'));
  axeSource = require('axe-core').source;
} catch {
  skip('playwright-core and axe-core are not installed (npm ci in tests/npm)');
}
const executablePath = findBrowser();
if (!executablePath) skip(`no browser: none of ${NAMES.join(', ')} is in PATH`);

const browser = await chromium.launch({
  executablePath,
  args: ['--disable-dev-shm-usage', ...(process.getuid() === 0 ? ['--no-sandbox'] : [])],
});
let page = null;
let problems = [];

// What the page said that it should not have. A server that is away is expected now and then.
function remember(text) {
  if (!/net::ERR_|status of (401|503)/.test(text)) problems.push(text);
}

const commands = {
  async open({ url, width = 1440, height = 1000, scheme = 'light', scale = 1 }) {
    await page?.context().close();
    const context = await browser.newContext({
      viewport: { width, height }, colorScheme: scheme, deviceScaleFactor: scale, reducedMotion: 'reduce',
    });
    page = await context.newPage();
    page.setDefaultTimeout(COMMAND_MS);
    problems = [];
    page.on('console', (message) => message.type() === 'error' && remember(message.text()));
    page.on('pageerror', (error) => remember(String(error.stack)));
    page.on('request', (request) => {
      const { hostname, protocol } = new URL(request.url());
      if (hostname !== '127.0.0.1' && protocol !== 'data:') remember(`asked ${hostname} for something`);
    });
    await page.addInitScript(() => {
      window.renderTimes = [];
      new PerformanceObserver((list) => {
        for (const entry of list.getEntriesByName('spindle-render')) window.renderTimes.push(entry.duration);
      }).observe({ type: 'measure' });
    });
    await page.goto(url);
  },
  eval: ({ expression }) => page.evaluate(expression),
  async wait({ expression, seconds = 10 }) {
    // Not waitForFunction: the page's policy forbids what it does with text.
    const deadline = Date.now() + seconds * 1000;
    while (!await page.evaluate(`Boolean(${expression})`)) {
      if (Date.now() >= deadline) throw new Error(`not true within ${seconds} s`);
      await page.waitForTimeout(50);
    }
  },
  click: ({ selector }) => page.click(selector),
  fill: ({ selector, text }) => page.fill(selector, text),
  press: ({ selector, key }) => page.press(selector, key),
  resize: ({ width, height }) => page.setViewportSize({ width, height }),
  theme: ({ scheme }) => page.emulateMedia({ colorScheme: scheme }),
  shot: ({ file, full = false }) => page.screenshot({ path: file, fullPage: full }).then(() => file),
  problems: () => problems,
  // axe is injected by the test, past the page's own policy.
  async axe() {
    const client = await page.context().newCDPSession(page);
    await client.send('Runtime.evaluate', { expression: axeSource });
    const result = await page.evaluate(() => window.axe.run(document, { resultTypes: ['violations'] }));
    return result.violations.map(({ id, impact, nodes }) => ({ id, impact, nodes: nodes.map((node) => node.html.slice(0, 160)).slice(0, 4) }));
  },
};

console.log(JSON.stringify({ ready: executablePath }));
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...options } = JSON.parse(line);
  try {
    console.log(JSON.stringify({ value: (await commands[command](options)) ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error.message ?? error) }));
  }
}
await browser.close();
