// Another tempo at the same pitch: WSOLA (Verhelst and Roelands, 1993).
// The sound goes on as it is until it has drifted too far from where it should be; then a hop fades over
// to the most alike place near there. The places are found once, in the sum of all tracks, so that tracks
// stay together and still sum to the mixture.

function hopOf(rate) { return 2 * Math.round(rate * .015); }

// How alike two stretches are, for each shift of the second one.
function likeness(a, around, shift, hop) {
  let sum = 0, power = 1e-9;
  for (let i = 0; i < hop; i += 4) { const y = around[shift + i]; sum += a[i] * y; power += y * y; }
  return sum / Math.sqrt(power);
}

function mostAlike(a, around, hop) {
  let best = -Infinity, found = 0;
  const last = around.length - hop, look = (from, to, by) => {
    for (let shift = Math.max(0, from); shift <= Math.min(last, to); shift += by) {
      const value = likeness(a, around, shift, hop);
      if (value > best) { best = value; found = shift; }
    }
  };
  look(0, last, 6);
  look(found - 5, found + 5, 1);
  return found;
}

// `read(from, length)`: samples of the sum, 0 outside; `place(k)`: where hop k should begin, null at the end.
// Yields [where the sound would go on, where it goes on].
function* hops(read, place, hop) {
  const reach = hop >> 1;
  let natural = null;
  for (let k = 0; ; k++) {
    const at = place(k);
    if (at === null) return;
    const near = Math.round(at);
    let next = natural = natural ?? near;
    if (Math.abs(natural - near) > reach)
      next = near - reach + mostAlike(read(natural, hop), read(near - reach, hop + 2 * reach), hop);
    yield [natural, next];
    natural = next + hop;
  }
}

// Where hops begin, from `state.at` on at its tempo, round and round in a loop.
function places(state, rate, hop, duration) {
  return k => {
    const t = instant(state, k * hop / rate);
    return t >= duration ? null : t * rate;
  };
}

function rising(hop) { return Float32Array.from({ length: hop }, (_, i) => .5 - .5 * Math.cos(Math.PI * (i + .5) / hop)); }

// One channel, hop after hop.
function rendered(x, pairs, hop) {
  const out = new Float32Array(pairs.length * hop), window = rising(hop);
  pairs.forEach(([natural, next], k) => {
    for (let i = 0, at = k * hop; i < hop; i++, at++) {
      const old = x[natural + i] || 0;
      out[at] = natural === next ? old : old + window[i] * ((x[next + i] || 0) - old);
    }
  });
  return out;
}
