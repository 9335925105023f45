// What a reader must know before believing the rest of the page.

// link: { state: 'connecting' | 'live' | 'polling' | 'lost', retryAtMs }.
// Returns the conditions that hold, the worst first: { level: 'bad' | 'warn', title, detail }.
export function conditions(link, state, silent) {
  const found = [];
  if (link.state === 'lost') {
    // No countdown here: this is read aloud when it changes.
    found.push({
      level: 'bad',
      title: 'Disconnected',
      detail: 'The server does not answer; trying again.'
        + (state ? ' What is shown is the last that was known.' : ''),
    });
  }
  if (link.state === 'polling') {
    found.push({
      level: 'warn', title: 'Slow updates', detail: 'No event stream is free; asking now and then instead.',
    });
  }
  if (!state) return found;
  for (const { stage, seconds } of silent) {
    found.push({
      level: 'bad', title: `Stage ${stage} does not report`, detail: `Nothing for ${Math.floor(seconds)} s.`,
    });
  }
  if (state.draining) {
    found.push({
      level: 'warn',
      title: 'Draining',
      detail: `New requests are refused; ${state.requests.running + state.requests.waiting} are left.`,
    });
  }
  return found;
}

export function linkLabel(link, nowMs) {
  switch (link.state) {
    case 'live': return 'Live';
    case 'polling': return 'Polling';
    case 'lost': return `Retry in ${Math.max(0, Math.ceil((link.retryAtMs - nowMs) / 1000))} s`;
    default: return 'Connecting';
  }
}

// Milliseconds before attempt number `attempt` (from 0): doubling from one second to ten, a fifth of
// it at random so that many pages do not come back at once. `random` in [0, 1).
export function backoffMs(attempt, random) {
  const whole = Math.min(10000, 1000 * 2 ** Math.min(attempt, 10));
  return Math.round(whole * (0.8 + 0.2 * random));
}
