// What a tally of votes says.

/** Wilson's 95 % interval of a share. */
export function wilson(hits, total) {
  if (!total) return [0, 1];
  const z = 1.959964;
  const share = hits / total;
  const centre = (share + (z * z) / (2 * total)) / (1 + (z * z) / total);
  const half = (z / (1 + (z * z) / total)) * Math.sqrt((share * (1 - share)) / total + (z * z) / (4 * total * total));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** Two-sided sign test: how likely a split at least as uneven is where neither is preferred. Ties are left out. */
export function signTest(a, b) {
  const total = a + b;
  if (!total) return 1;
  let tail = 0;
  let term = 0.5 ** total;
  for (let k = 0; k <= Math.min(a, b); k++) {
    tail += term;
    term *= (total - k) / (k + 1);
  }
  return Math.min(1, 2 * tail);
}
