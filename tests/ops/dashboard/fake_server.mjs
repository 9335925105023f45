// The dashboard over a simulation, for work on the pages without a cluster.
//
//   node fake_server.mjs [--port N] [--stages S] [--layers L] [--key KEY] [--past SECONDS]
//
// L is layers per stage. Prints "port N" and serves until its standard input closes.

import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { Simulation } from './simulation.mjs';

const PAGES = fileURLToPath(new URL('../../../ops/dashboard/', import.meta.url));
const TYPES = {
  '.html': 'text/html; charset=utf-8', '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8', '.svg': 'image/svg+xml',
};
// As cluster/api/http_pages.cc, so that what it forbids fails here too.
const POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
  + "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

// The file behind a path, or null.
function fileOf(pathname) {
  if (pathname === '/dashboard') return path.join(PAGES, 'index.html');
  const name = /^\/dashboard\/((?:[\w-]+\/)*[\w-]+(?:\.[\w-]+)+)$/.exec(pathname)?.[1];
  if (!name) return null;
  return path.join(PAGES, name.replace(/^uplot\//, 'node_modules/uplot/dist/'));
}

export async function startServer({ port = 0, stages = 3, layers = 4, key = '', past = 0 } = {}) {
  const simulation = new Simulation({ stages, layers, startMs: Date.now() - past * 1000 });
  for (let i = 0; i < past; i += 1) simulation.step();
  const streams = new Set();
  const event = () => `event: state\ndata: ${JSON.stringify(simulation.state())}\n\n`;
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, 'http://localhost');
    const cancel = /^\/v1\/spindle\/requests\/(\d+)\/cancel$/.exec(pathname);
    if (pathname === '/v1/spindle/events') {
      response.writeHead(200, { 'Content-Type': 'text/event-stream' });
      response.write(`retry: 10000\n\n${event()}`);
      streams.add(response);
      request.on('close', () => streams.delete(response));
    } else if (pathname === '/v1/spindle/state') {
      response.writeHead(200, { 'Content-Type': 'application/json' }).end(JSON.stringify(simulation.state()));
    } else if (cancel && request.method === 'POST') {
      const allowed = !key || request.headers.authorization === `Bearer ${key}`;
      const found = allowed && simulation.cancel(cancel[1]);
      response.writeHead(!allowed ? 401 : found ? 202 : 404, { 'Content-Type': 'application/json' });
      response.end(JSON.stringify({ cancelled: found }));
    } else {
      const file = fileOf(pathname);
      const body = file && await readFile(file).catch(() => null);
      if (!body) {
        response.writeHead(404).end();
        return;
      }
      response.writeHead(200, { 'Content-Type': TYPES[path.extname(file)] ?? 'text/plain', 'Content-Security-Policy': POLICY, 'X-Content-Type-Options': 'nosniff' });
      response.end(body);
    }
  });
  const clock = setInterval(() => {
    simulation.step();
    const text = event();
    for (const stream of streams) stream.write(text);
  }, 1000);
  await new Promise((resolve) => { server.listen(port, '127.0.0.1', resolve); });
  return {
    port: server.address().port,
    simulation,
    stop() {
      clearInterval(clock);
      for (const stream of streams) stream.end();
      server.close();
      server.closeAllConnections();
    },
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values } = parseArgs({
    options: {
      port: { type: 'string', default: '0' }, stages: { type: 'string', default: '3' },
      layers: { type: 'string', default: '4' }, key: { type: 'string', default: '' },
      past: { type: 'string', default: '0' },
    },
  });
  const server = await startServer({
    port: Number(values.port), stages: Number(values.stages), layers: Number(values.layers), key: values.key, past: Number(values.past),
  });
  console.log(`port ${server.port}`);
  process.stdin.resume();
  process.stdin.on('end', () => { server.stop(); });
}
