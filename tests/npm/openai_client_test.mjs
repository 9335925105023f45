// The official OpenAI client against a running Spindle server. Prints TAP, exits 1 on a failure.
//
//   node openai_client_test.mjs --url http://127.0.0.1:8000/v1 [--api-key KEY] [--model NAME]
//   node openai_client_test.mjs --server PATH/api_fake_server
//
// The environment works too: SPINDLE_URL, SPINDLE_API_KEY, SPINDLE_MODEL. With --server the script
// starts that program, with an API key, and stops it at the end. Without a model it takes the first
// one the server lists. Nothing depends on what the model says, only on the shape of the answers.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import process from 'node:process';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';

import { importOrSkip } from './oracles/driver.mjs';

const { default: OpenAI } = await importOrSkip('openai');

const TEST_TIMEOUT_MS = 60_000;
const START_TIMEOUT_MS = 60_000;

const { values: args } = parseArgs({
  options: {
    url: { type: 'string', default: process.env.SPINDLE_URL },
    'api-key': { type: 'string', default: process.env.SPINDLE_API_KEY },
    model: { type: 'string', default: process.env.SPINDLE_MODEL },
    server: { type: 'string' },
  },
});

function within(promise, ms, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} took more than ${ms} ms`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// Starts the scripted server; it says "port N" and runs until its standard input closes.
async function startServer(path) {
  const key = 'sk-test';
  const child = spawn(path, ['0', key], { stdio: ['pipe', 'pipe', 'inherit'] });
  const firstLine = new Promise((resolve, reject) => {
    createInterface({ input: child.stdout }).once('line', resolve);
    child.once('error', reject);
    child.once('exit', (code) => reject(new Error(`the server exited with ${code}`)));
  });
  const port = Number((await within(firstLine, START_TIMEOUT_MS, 'starting the server')).split(' ')[1]);
  return { url: `http://127.0.0.1:${port}/v1`, key, stop: () => child.stdin.end() };
}

const server = args.server ? await startServer(args.server) : null;
const baseURL = server?.url ?? args.url;
if (!baseURL) {
  console.error('give --url, SPINDLE_URL or --server');
  process.exit(2);
}
const apiKey = server?.key ?? args['api-key'];
const client = new OpenAI({ baseURL, apiKey: apiKey ?? 'none', maxRetries: 0, timeout: TEST_TIMEOUT_MS });
const model = args.model ?? (await client.models.list()).data[0].id;
const messages = [{ role: 'user', content: 'Tell me a story about the sea.' }];

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function stateOfServer() {
  const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
  const response = await fetch(`${baseURL}/spindle/state`, { headers });
  assert.equal(response.status, 200);
  return response.json();
}

const tests = {
  'lists the model': async () => {
    const list = await client.models.list();
    assert.ok(list.data.some((entry) => entry.id === model));
    const one = await client.models.retrieve(model);
    assert.equal(one.id, model);
    assert.equal(one.object, 'model');
  },

  'chat': async () => {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 8 });
    assert.equal(answer.object, 'chat.completion');
    assert.match(answer.id, /^chatcmpl-/);
    assert.equal(answer.choices.length, 1);
    assert.equal(answer.choices[0].message.role, 'assistant');
    assert.equal(typeof answer.choices[0].message.content, 'string');
    assert.ok(['stop', 'length'].includes(answer.choices[0].finish_reason));
    assert.ok(answer.usage.completion_tokens >= 1 && answer.usage.completion_tokens <= 8);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },

  'chat with max_completion_tokens and content parts': async () => {
    const parts = [{ role: 'user', content: [{ type: 'text', text: 'Tell me a story' }, { type: 'text', text: 'about it.' }] }];
    const answer = await client.chat.completions.create({ model, messages: parts, max_completion_tokens: 3, ignore_eos: true });
    assert.equal(answer.usage.completion_tokens, 3);
    assert.equal(answer.choices[0].finish_reason, 'length');
  },

  'chat, streamed': async () => {
    const request = { model, messages, max_tokens: 12, seed: 1, temperature: 0 };
    const whole = await client.chat.completions.create(request);
    const chunks = await collect(await client.chat.completions.create({ ...request, stream: true }));
    assert.equal(chunks[0].choices[0].delta.role, 'assistant');
    assert.ok(chunks.every((chunk) => chunk.object === 'chat.completion.chunk' && chunk.id === chunks[0].id));
    const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');
    assert.equal(text, whole.choices[0].message.content);
    const reasons = chunks.map((chunk) => chunk.choices[0]?.finish_reason).filter(Boolean);
    assert.deepEqual(reasons, [whole.choices[0].finish_reason]);
  },

  'chat, streamed through the helper': async () => {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 6 });
    const final = await stream.finalChatCompletion();
    assert.equal(typeof final.choices[0].message.content, 'string');
  },

  'completions': async () => {
    const answer = await client.completions.create({ model, prompt: 'Once upon a time', max_tokens: 5 });
    assert.equal(answer.object, 'text_completion');
    assert.match(answer.id, /^cmpl-/);
    assert.equal(typeof answer.choices[0].text, 'string');
    assert.ok(answer.usage.completion_tokens <= 5);
  },

  'completions of several prompts, with echo': async () => {
    const answer = await client.completions.create({ model, prompt: ['First', 'Second'], echo: true, max_tokens: 2 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    assert.ok(answer.choices[0].text.startsWith('First'));
    assert.ok(answer.choices[1].text.startsWith('Second'));
  },

  'completions, streamed with usage': async () => {
    const chunks = await collect(await client.completions.create({
      model, prompt: 'Once upon a time', max_tokens: 5, ignore_eos: true, stream: true, stream_options: { include_usage: true },
    }));
    const last = chunks.at(-1);
    assert.deepEqual(last.choices, []);
    assert.equal(last.usage.completion_tokens, 5);
    assert.ok(chunks.slice(0, -1).every((chunk) => chunk.usage === null));
    assert.equal(chunks.at(-2).choices[0].finish_reason, 'length');
  },

  'n = 2': async () => {
    const answer = await client.chat.completions.create({ model, messages, n: 2, max_tokens: 4, temperature: 0.8 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
    const chunks = await collect(await client.chat.completions.create({ model, messages, n: 2, max_tokens: 4, stream: true }));
    const finished = chunks.filter((chunk) => chunk.choices[0]?.finish_reason).map((chunk) => chunk.choices[0].index);
    assert.deepEqual(finished.sort(), [0, 1]);
  },

  'logprobs of a chat': async () => {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 3, ignore_eos: true, logprobs: true, top_logprobs: 2 });
    const { content } = answer.choices[0].logprobs;
    assert.equal(content.length, 3);
    for (const token of content) {
      assert.ok(token.logprob <= 0);
      assert.equal(token.top_logprobs.length, 2);
      assert.ok(Array.isArray(token.bytes));
    }
    const bytes = Buffer.from(content.flatMap((token) => token.bytes));
    assert.equal(bytes.toString('utf8'), answer.choices[0].message.content);
  },

  'logprobs of a completion': async () => {
    const answer = await client.completions.create({ model, prompt: 'Once upon', max_tokens: 3, ignore_eos: true, logprobs: 2 });
    const { tokens, token_logprobs, top_logprobs, text_offset } = answer.choices[0].logprobs;
    assert.equal(tokens.length, 3);
    assert.equal(token_logprobs.length, 3);
    assert.equal(text_offset[0], 0);
    assert.ok(top_logprobs.every((top) => Object.keys(top).length >= 1));
    assert.equal(tokens.join(''), answer.choices[0].text);
  },

  'stop strings': async () => {
    const request = { model, prompt: 'Once upon a time', max_tokens: 20, temperature: 0, seed: 3, ignore_eos: true };
    const whole = (await client.completions.create(request)).choices[0].text;
    const stop = [...whole].slice(4, 7).join('');
    const cut = await client.completions.create({ ...request, stop: [stop] });
    assert.equal(cut.choices[0].finish_reason, 'stop');
    assert.equal(cut.choices[0].text, whole.slice(0, whole.indexOf(stop)));
  },

  'BadRequestError': async () => {
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.param, 'temperature');
      assert.equal(error.type, 'invalid_request_error');
      assert.ok(error.requestID);
      return true;
    });
    await assert.rejects(client.completions.create({ model, prompt: 'a', max_tokens: 2 ** 30 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.code, 'context_length_exceeded');
      return true;
    });
    await assert.rejects(
      client.chat.completions.create({ model, messages, response_format: { type: 'json_object' } }),
      OpenAI.BadRequestError);
  },

  'NotFoundError': async () => {
    await assert.rejects(client.chat.completions.create({ model: 'no-such-model', messages }), (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, 'model_not_found');
      return true;
    });
    await assert.rejects(client.models.retrieve('no-such-model'), OpenAI.NotFoundError);
  },

  'AuthenticationError': async () => {
    if (!apiKey) return 'the server has no API key';
    const stranger = new OpenAI({ baseURL, apiKey: 'sk-wrong', maxRetries: 0 });
    await assert.rejects(stranger.models.list(), (error) => {
      assert.ok(error instanceof OpenAI.AuthenticationError);
      assert.equal(error.code, 'invalid_api_key');
      return true;
    });
    return undefined;
  },

  'abort in mid-stream': async () => {
    const before = await stateOfServer();
    const stream = await client.completions.create({
      model, prompt: 'Once upon a time', max_tokens: 2000, ignore_eos: true, stream: true,
    });
    let chunks = 0;
    for await (const chunk of stream) {
      assert.equal(chunk.object, 'text_completion');
      chunks += 1;
      if (chunks === 3) stream.controller.abort();
    }
    assert.ok(chunks < 2000);
    const deadline = Date.now() + 10_000;
    let state = await stateOfServer();
    while (state.requests.cancelled === before.requests.cancelled && Date.now() < deadline) {
      await new Promise((resolve) => { setTimeout(resolve, 50); });
      state = await stateOfServer();
    }
    assert.equal(state.requests.cancelled, before.requests.cancelled + 1);
  },
};

let passed = 0;
let failed = 0;
let skipped = 0;
let number = 0;
console.log(`TAP version 13\n1..${Object.keys(tests).length}`);
for (const [name, test] of Object.entries(tests)) {
  number += 1;
  try {
    const skip = await within(test(), TEST_TIMEOUT_MS, name);
    if (skip) skipped += 1; else passed += 1;
    console.log(`ok ${number} - ${name}${skip ? ` # SKIP ${skip}` : ''}`);
  } catch (error) {
    failed += 1;
    console.log(`not ok ${number} - ${name}`);
    console.log(String(error?.stack ?? error).split('\n').map((line) => `# ${line}`).join('\n'));
  }
}
server?.stop();
console.log(`# ${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ''}`);
process.exit(failed > 0 ? 1 : 0);
