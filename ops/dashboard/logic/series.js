// Parts of columns, for charts and their tables.

// Rows of `time` (ascending) within the last `seconds`: the index of the first.
export function firstWithin(time, seconds) {
  if (time.length === 0) return 0;
  const from = time[time.length - 1] - seconds;
  let low = 0;
  let high = time.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (time[middle] < from) low = middle + 1; else high = middle;
  }
  return low;
}

// { last, min, mean, max } of the numbers from index `first` on; all null without any.
export function summary(values, first) {
  let n = 0;
  let sum = 0;
  let min = null;
  let max = null;
  for (let i = first; i < values.length; i += 1) {
    const value = values[i];
    if (value === null || value === undefined) continue;
    n += 1;
    sum += value;
    if (min === null || value < min) min = value;
    if (max === null || value > max) max = value;
  }
  const last = values.length > 0 ? values[values.length - 1] ?? null : null;
  return { last, min, mean: n > 0 ? sum / n : null, max };
}

// share[i] = part[i] / whole[i].
export function shares(part, whole) {
  return part.map((value, i) => (value === null || !(whole[i] > 0) ? null : value / whole[i]));
}

// Distances between an axis' ticks to choose from: 1, 2 and 5 times the powers of ten, or powers of two.
export function decimalSteps(fromPower, toPower) {
  const steps = [];
  for (let power = fromPower; power <= toPower; power += 1) {
    for (const digit of [1, 2, 5]) steps.push(Number(`${digit}e${power}`));
  }
  return steps;
}

export function binarySteps() {
  return Array.from({ length: 50 }, (_, i) => 2 ** i);
}
