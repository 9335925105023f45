// A request's progress.

// { phase, fraction, text }: of the prompt while it is computed, then of the output. The fraction is
// of both together, so that a bar never goes back.
export function progress(request) {
  const prompt = Math.max(0, request.prompt_tokens);
  const prefilled = Math.min(prompt, request.prefilled_tokens);
  const output = Math.max(0, request.max_tokens);
  const generated = Math.max(0, request.generated_tokens);
  const whole = prompt + output;
  const fraction = whole > 0 ? Math.min(1, (prefilled + generated) / whole) : 0;
  const promptShare = whole > 0 ? prompt / whole : 0;
  if (request.state === 'waiting' && prefilled === 0 && generated === 0) {
    return { phase: 'waiting', fraction: 0, promptShare, text: `${prompt} prompt tokens` };
  }
  if (generated === 0 && prefilled < prompt) {
    return { phase: 'prefill', fraction, promptShare, text: `prompt ${prefilled} of ${prompt}` };
  }
  return { phase: 'decode', fraction, promptShare, text: `${generated} of at most ${output}` };
}

// What to show next, given the rows shown now. Free: exactly the server's list. Held (somebody points
// at the table): rows stay where they are, those that ended stay too, new ones come below.
export function arrangeRows(shown, requests, held) {
  const byId = new Map(requests.map((request) => [request.id, request]));
  if (!held) return requests.map((request) => ({ id: request.id, request, ended: false }));
  const rows = shown.map((row) => ({
    id: row.id, request: byId.get(row.id) ?? row.request, ended: !byId.has(row.id),
  }));
  const known = new Set(shown.map((row) => row.id));
  for (const request of requests) {
    if (!known.has(request.id)) rows.push({ id: request.id, request, ended: false });
  }
  return rows;
}
