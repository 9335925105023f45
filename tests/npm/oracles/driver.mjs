// Talks to text_oracle_driver: one JSON request and one JSON reply for each line.

import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

export class Driver {
  constructor(path) {
    this.process = spawn(path, { stdio: ["pipe", "pipe", "inherit"] });
    this.lines = createInterface({ input: this.process.stdout })[Symbol.asyncIterator]();
  }

  async ask(request) {
    this.process.stdin.write(JSON.stringify(request) + "\n");
    const { value, done } = await this.lines.next();
    if (done) throw new Error("the driver has ended");
    return JSON.parse(value);
  }

  end() {
    this.process.stdin.end();
  }
}

// A small seeded generator (mulberry32), so that a failure can be repeated.
export function seededRandom(seed) {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

// The package, or the end of the process with the exit code that ctest counts as a skip.
export async function importOrSkip(name) {
  try {
    return await import(name);
  } catch (error) {
    console.log(`skipped: ${error.message} (npm ci in tests/npm installs it)`);
    process.exit(77);
  }
}
