// What follows from the state alone: no page, no sound. Node tests these.

// Solo wins: if any track is soloed, the soloed ones sound, otherwise all that are not muted.
function audible(names, tracks) {
  const solo = names.some(name => tracks[name].solo);
  return names.map(name => solo ? tracks[name].solo : !tracks[name].mute);
}

function loudness(db) { return db <= -40 ? 0 : 10 ** (db / 20); }

// All sets play all the time; only tracks of the chosen one have a gain.
function gains(sets, state) {
  return sets.map((set, i) => {
    const sounding = audible(set.stems.map(stem => stem.name), state.tracks);
    return set.stems.map((stem, k) => i === state.set && sounding[k] ? loudness(state.tracks[stem.name].db) : 0);
  });
}

// What a StereoPanner does to stereo: [left to left, left to right, right to left, right to right].
function panned(pan) {
  const turn = (pan <= 0 ? pan + 1 : pan) * Math.PI / 2;
  return pan <= 0 ? [1, 0, Math.cos(turn), Math.sin(turn)] : [Math.cos(turn), Math.sin(turn), 0, 1];
}

function panText(pan) {
  const part = Math.round(Math.abs(pan) * 100);
  return part === 0 ? "centre" : `${part} % ${pan < 0 ? "left" : "right"}`;
}

// The place in the song after some seconds on the clock, in a loop or not.
function instant(state, elapsed) {
  const at = state.at + elapsed * (state.tempo || 1), length = state.to - state.from;
  return state.loop && length > 0 && at >= state.to ? state.from + (at - state.from) % length : at;
}

function clock(t) {
  return Math.floor(t / 60) + ":" + (t % 60 < 10 ? "0" : "") + (Math.floor(t % 60 * 10) / 10).toFixed(1);
}

// A stretch of the song, made shorter or longer around an instant, inside the song.
function zoomed(left, right, around, factor, duration) {
  const width = Math.min(duration, Math.max(.05, (right - left) * factor));
  const start = around - (around - left) * width / (right - left);
  return moved(start, start + width, 0, duration);
}

function moved(left, right, by, duration) {
  const start = Math.max(0, Math.min(left + by, duration - (right - left)));
  return [start, Math.min(duration, start + right - left)];
}

// Seconds between the marks of a ruler, so that at most so many fit in.
function step(seconds, most) {
  const steps = [.01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800];
  return steps.find(s => seconds / s <= most) || 3600;
}
