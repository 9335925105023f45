// Cumulative histograms as the server counts them: { bounds, counts, sum }, where counts[i] is the
// number of observations <= bounds[i] and the last count, one more than there are bounds, all.

// What was observed between two snapshots; null when they are not of the same process.
export function difference(newer, older) {
  if (!newer) return null;
  if (!older) return newer;
  if (newer.counts.length !== older.counts.length) return null;
  const counts = newer.counts.map((value, i) => value - older.counts[i]);
  if (counts.some((value) => value < 0)) return null;
  return { bounds: newer.bounds, counts, sum: newer.sum - older.sum };
}

export function total(histogram) {
  return histogram && histogram.counts.length > 0 ? histogram.counts[histogram.counts.length - 1] : 0;
}

// As Prometheus' histogram_quantile: linear within a bucket, the last bound for what lies beyond.
// null without observations.
export function quantile(histogram, q) {
  const n = total(histogram);
  if (n <= 0) return null;
  const { bounds, counts } = histogram;
  const rank = q * n;
  const bucket = counts.findIndex((value) => value >= rank && value > 0);
  if (bucket >= bounds.length) return bounds.length > 0 ? bounds[bounds.length - 1] : null;
  const low = bucket === 0 ? 0 : bounds[bucket - 1];
  const before = bucket === 0 ? 0 : counts[bucket - 1];
  const inside = counts[bucket] - before;
  if (inside <= 0) return bounds[bucket];
  return low + (bounds[bucket] - low) * ((rank - before) / inside);
}
