// The balancer's decisions in words.

export function direction(move) {
  return move.to_ratio < move.from_ratio ? 'stronger' : 'lighter';
}

// Newest first; of one stage, or of all (null).
export function listMoves(moves, stage, limit) {
  return (moves ?? []).filter((move) => stage === null || move.stage === stage)
    .slice(-limit).reverse();
}

// Positions of labels, moved apart to at least `gap`, within [low, high], in the order given. The
// result keeps the labels' vertical order.
export function spread(positions, gap, low, high) {
  const order = positions.map((_, i) => i).sort((a, b) => positions[a] - positions[b] || a - b);
  const out = positions.slice();
  let floor = low;
  for (const i of order) {
    out[i] = Math.max(out[i], floor);
    floor = out[i] + gap;
  }
  let ceiling = high;
  for (const i of order.reverse()) {
    out[i] = Math.min(out[i], ceiling);
    ceiling = out[i] - gap;
  }
  return out;
}
