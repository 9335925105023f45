// States of a made-up server, in the shape of GET /v1/spindle/state: as many stages and layers as
// wanted, under a load that comes and goes. The same seed gives the same states.

const PLANS = ['FULL raw/raw', 'EVICT lloyd2/lloyd2', 'EVICT lloyd1/lloyd1', 'FULL token',
  'FULL codebook/codebook', 'STREAM raw/raw 128', 'FULL int4/int4'];
const REASONS = ['16 requests want to run, 11 fit, and this stage is the tightest',
  'nobody waits and its pool is half empty'];
const TTFT_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10];
const ITL_BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1];
const GIB = 1024 ** 3;

export function randomSource(seed) {
  let state = (seed >>> 0) || 1;
  return () => {
    state ^= state << 13; state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5; state >>>= 0;
    return state / 2 ** 32;
  };
}

class Histogram {
  constructor(bounds) {
    this.bounds = bounds;
    this.counts = new Array(bounds.length + 1).fill(0);
    this.sum = 0;
  }

  observe(value) {
    this.sum += value;
    const first = this.bounds.findIndex((bound) => value <= bound);
    for (let i = first < 0 ? this.bounds.length : first; i < this.counts.length; i += 1) this.counts[i] += 1;
  }

  json() {
    return { bounds: this.bounds, counts: [...this.counts], sum: this.sum };
  }
}

export class Simulation {
  constructor({ stages = 3, layers = 4, seed = 1, startMs = Date.now() } = {}) {
    this.random = randomSource(seed);
    this.nowMs = startMs;
    this.uptime = 3600;
    this.nextId = 1001;
    this.counts = { accepted: 0, finished: 0, failed: 0, cancelled: 0, refused: 0, expired: 0, preemptions: 0, recomputed_tokens: 0 };
    this.tokens = { prompt: 0, generation: 0, steps: 0 };
    this.latency = {
      time_to_first_token_seconds: new Histogram(TTFT_BOUNDS),
      inter_token_latency_seconds: new Histogram(ITL_BOUNDS),
      e2e_request_latency_seconds: new Histogram(TTFT_BOUNDS),
    };
    this.requests = [];
    this.moves = [];
    this.draining = false;
    this.stages = Array.from({ length: stages }, (_, stage) => ({
      stage, layers, level: 0.25, capacity: (1.5 + (stage % 3) * 0.5) * GIB, steps: 0, busy: 0,
      bubble: { empty: 0, upstream: 0, downstream: 0 }, compress: 0, transfer: 0, peak: 0,
    }));
  }

  cancel(id) {
    const before = this.requests.length;
    this.requests = this.requests.filter((request) => request.id !== id);
    if (this.requests.length === before) return false;
    this.counts.cancelled += 1;
    return true;
  }

  // One second of work.
  step() {
    this.nowMs += 1000;
    this.uptime += 1;
    this.tokens.steps += 40;
    const wave = 0.6 + 0.4 * Math.sin(this.uptime / 20);
    while (!this.draining && this.random() < 0.75 * wave) this.#arrive();
    this.#work();
    this.stages.forEach((stage, i) => this.#stage(stage, i, wave));
    return this.state();
  }

  #arrive() {
    this.counts.accepted += 1;
    this.requests.push({
      id: String(this.nextId += 1), state: 'waiting', priority: this.random() < 0.1 ? -10 : 0,
      prompt_tokens: Math.floor(200 + 7000 * this.random()), prefilled_tokens: 0, generated_tokens: 0,
      max_tokens: Math.floor(64 + 400 * this.random()), born: this.nowMs, policy: this.random() < 0.3 ? 'snapkv 0.2' : 'spindle 0.1',
    });
  }

  #work() {
    let running = 0;
    for (const request of this.requests) {
      if (running >= 12) break;
      running += 1;
      request.state = 'running';
      if (request.prefilled_tokens < request.prompt_tokens) {
        const done = Math.min(2500, request.prompt_tokens - request.prefilled_tokens);
        request.prefilled_tokens += done;
        this.tokens.prompt += done;
        if (request.prefilled_tokens === request.prompt_tokens) {
          this.latency.time_to_first_token_seconds.observe((this.nowMs - request.born) / 1000 * this.random());
        }
      } else {
        const done = Math.min(30, request.max_tokens - request.generated_tokens);
        request.generated_tokens += done;
        this.tokens.generation += done;
        for (let i = 0; i < done; i += 1) this.latency.inter_token_latency_seconds.observe(0.02 + 0.05 * this.random() ** 4);
      }
    }
    for (const request of this.requests.filter((one) => one.generated_tokens >= one.max_tokens)) {
      this.counts.finished += 1;
      this.latency.e2e_request_latency_seconds.observe((this.nowMs - request.born) / 1000);
    }
    this.requests = this.requests.filter((one) => one.generated_tokens < one.max_tokens);
  }

  #stage(stage, i, wave) {
    const busy = this.requests.length === 0 ? 0 : (0.5 + 0.2 * Math.sin(i) + 0.2 * wave);
    stage.steps += 40;
    stage.busy += busy;
    stage.bubble.upstream += (1 - busy) * 0.4;
    stage.bubble.downstream += (1 - busy) * 0.3;
    stage.bubble.empty += (1 - busy) * 0.25;
    stage.compress += 0.01;
    stage.transfer += 0.02;
    if (this.random() < 0.03) {
      const to = Math.min(1, Math.max(0.05, stage.level * (this.random() < 0.5 ? 0.7 : 1.3)));
      this.moves.push({
        unix_ms: this.nowMs, step: this.tokens.steps, stage: i, from_ratio: stage.level, to_ratio: to,
        reason: REASONS[to < stage.level ? 0 : 1],
      });
      this.moves = this.moves.slice(-64);
      stage.level = to;
    }
  }

  state() {
    const held = this.requests.reduce((sum, one) => sum + one.prefilled_tokens + one.generated_tokens, 0);
    const running = this.requests.filter((one) => one.state === 'running').length;
    const stages = this.stages.map((stage) => this.#stageJson(stage, held));
    return {
      model: 'simulated', version: '0.0.0', max_model_len: 32768, uptime_seconds: this.uptime,
      draining: this.draining, unix_ms: this.nowMs,
      requests: {
        running, waiting: this.requests.length - running,
        waiting_prompt_tokens: this.requests.slice(running).reduce((sum, one) => sum + one.prompt_tokens, 0),
        ...this.counts,
      },
      prompt_tokens: this.tokens.prompt, generation_tokens: this.tokens.generation, steps: this.tokens.steps,
      max_num_seqs: 12, micro_batches_in_flight: this.stages.length,
      balancer: {
        enabled: true, plans: this.moves.length, rounds: Math.floor(this.uptime), seconds: 0.1,
        wanted_requests: this.requests.length, fitting_requests: running, moves: this.moves,
      },
      latency: Object.fromEntries(Object.entries(this.latency).map(([name, histogram]) => [name, histogram.json()])),
      stages,
      active_requests: this.requests.slice(0, 200).map(({ born, ...one }) => ({ ...one, age_ms: this.nowMs - born })),
      active_requests_total: this.requests.length,
    };
  }

  #stageJson(stage, held) {
    const layers = Array.from({ length: stage.layers }, (_, i) => {
      const layer = stage.stage * stage.layers + i;
      const full = held * 4096;
      const share = Math.min(1, stage.level * (0.4 + 1.2 * Math.abs(Math.sin(layer * 1.7))));
      return {
        layer, used_bytes: Math.round(full * share), full_bytes: full,
        plan: held > 0 ? PLANS[Math.floor(Math.abs(Math.sin(layer * 12.9)) * PLANS.length)] : '',
        logical_tokens: held, retained_tokens: Math.round(held * share),
      };
    });
    const used = layers.reduce((sum, one) => sum + one.used_bytes, 0);
    stage.peak = Math.max(stage.peak, used);
    return {
      stage: stage.stage, host: `node-${Math.floor(stage.stage / 8)}`, device: `cuda:${stage.stage % 8}`,
      first_layer: stage.stage * stage.layers, n_layers: stage.layers, weight_bytes: 6 * GIB,
      kv_capacity_bytes: stage.capacity, kv_used_bytes: used, kv_peak_bytes: stage.peak,
      kv_committed_bytes: Math.min(stage.capacity, used * 1.4), kv_budget_bytes: used * 1.6, kv_level_ratio: stage.level, kv_price: 1,
      steps: stage.steps, busy_seconds: stage.busy, bubble_seconds: { ...stage.bubble },
      compress_seconds: stage.compress, transfer_seconds: stage.transfer, layers,
    };
  }
}
