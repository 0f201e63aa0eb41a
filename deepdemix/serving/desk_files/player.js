// The sound: opening it, playing it, and mixing it into a file.

const data = JSON.parse(document.getElementById("data").textContent);
const sets = data.sets, $ = id => document.getElementById(id);
const names = [...new Set(sets.flatMap(set => set.stems.map(stem => stem.name)))];
const state = {
  set: 0, playing: false, ready: false, at: 0, loop: false, from: 0, to: data.duration, tempo: 1, volume: 1,
  view: "waveform", left: 0, right: data.duration,
  tracks: Object.fromEntries(names.map(name => [name, { mute: false, solo: false, db: 0, pan: 0 }])),
};
let context = null, graph = null;

function fromText(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

// A page around this one may give the sound, and a gain that keeps it below full scale in files.
function wavOf(buffer, gain) {
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, c) => buffer.getChannelData(c).map(x => x * gain));
  return wav(channels, data.rate);
}

// The file of a stem: inside this page, from the program that made it, or from a page around this one.
async function fileOf(stem) {
  if (window.given) return wavOf(given.buffer(stem), given.gain);
  if (stem.sound) return fromText(stem.sound);
  const answer = await fetch(stem.url);
  if (!answer.ok) throw new Error("the program that made this page has closed this song");
  return new Uint8Array(await answer.arrayBuffer());
}

async function open() {
  const decoder = new OfflineAudioContext(1, 1, data.rate), all = sets.flatMap(set => set.stems);
  for (const [i, stem] of all.entries()) {
    stem.buffer = window.given ? given.buffer(stem) : await decoder.decodeAudioData((await fileOf(stem)).buffer);
    $("opening").value = (i + 1) / all.length;
    $("status").textContent = `opening the sound, ${i + 1} of ${all.length}`;
  }
  $("opening").hidden = true;
  state.ready = true;
}

function audio() {
  try { return new AudioContext({ sampleRate: data.rate }); } catch { return new AudioContext(); }
}

function strip(out, gain, pan) {
  const level = new GainNode(context, { gain, channelCount: 2, channelCountMode: "explicit" });
  const place = new StereoPannerNode(context, { pan });
  level.connect(place).connect(out);
  return { level, place, sources: [] };
}

function connect(when) {
  const out = new GainNode(context, { gain: state.volume }), meter = new AnalyserNode(context, { fftSize: 4096 });
  out.connect(meter).connect(context.destination);
  const now = gains(sets, state);
  const parts = sets.flatMap((set, i) => set.stems.map((stem, k) =>
    ({ stem, i, k, ...strip(out, now[i][k], state.tracks[stem.name].pan) })));
  const made = { out, meter, parts, when };
  if (state.tempo === 1) parts.forEach(part => sound(part, part.stem.buffer, when, state.at, state.loop));
  else feed(made);
  return made;
}

function sound(part, buffer, when, at = 0, loop = false) {
  const source = new AudioBufferSourceNode(context, { buffer });
  if (loop) Object.assign(source, { loop, loopStart: state.from, loopEnd: state.to });
  source.connect(part.level);
  source.start(when, at);
  source.onended = () => { part.sources = part.sources.filter(x => x !== source); };
  part.sources.push(source);
}

// The sum of a set's tracks, from a sample on.
function reader(set) {
  const channels = set.stems.flatMap(({ buffer }) =>
    Array.from({ length: buffer.numberOfChannels }, (_, c) => buffer.getChannelData(c)));
  return (from, length) => {
    const out = new Float32Array(length);
    for (const x of channels) for (let i = 0; i < length; i++) out[i] += x[from + i] || 0;
    return out;
  };
}

function hopsOf(set, where) {
  const hop = hopOf(data.rate);
  return hops(reader(set), places(where, data.rate, hop, data.duration), hop);
}

function stretched(buffer, pairs) {
  const hop = hopOf(data.rate), count = buffer.numberOfChannels;
  const out = new AudioBuffer({ length: pairs.length * hop, numberOfChannels: count, sampleRate: data.rate });
  for (let c = 0; c < count; c++) out.copyToChannel(rendered(buffer.getChannelData(c), pairs, hop), c);
  return out;
}

// At another tempo the sound is made a few seconds ahead, in pieces that lie end to end.
function feed(made) {
  const hop = hopOf(data.rate), pairs = hopsOf(sets[state.set], { ...state });
  let next = made.when;
  const more = () => {
    while (next < context.currentTime + 3) {
      const piece = [];
      for (let pair; piece.length < 16 && !(pair = pairs.next()).done;) piece.push(pair.value);
      if (!piece.length) return clearInterval(made.timer);
      for (const part of made.parts) sound(part, stretched(part.stem.buffer, piece), next);
      next += piece.length * hop / data.rate;
    }
  };
  made.timer = setInterval(more, 300);
  more();
}

function position() {
  if (!graph) return state.at;
  return Math.min(instant(state, Math.max(0, context.currentTime - graph.when)), data.duration);
}

function stop() {
  if (!graph) return;
  state.at = position();
  const { out, parts, timer } = graph, now = context.currentTime;
  clearInterval(timer);
  out.gain.setTargetAtTime(0, now, .004);
  parts.forEach(part => part.sources.forEach(source => source.stop(now + .03)));
  graph = null;
}

async function play() {
  if (!state.ready) return;
  context = context || audio();
  if (context.state !== "running") await context.resume();
  stop();
  if (state.loop && (state.at < state.from || state.at >= state.to)) state.at = state.from;
  if (state.at >= data.duration - .01) state.at = 0;
  graph = connect(context.currentTime + .02);
  state.playing = true;
  apply();
}

function pause() { stop(); state.playing = false; apply(); }

// Stop, change something, and go on from there.
function restart(change) {
  const on = state.playing;
  stop();
  change();
  on ? play() : apply();
}

function go(t) { restart(() => { state.at = Math.min(Math.max(t, 0), data.duration); }); }

function region(from, to) {
  [from, to] = [Math.min(from, to), Math.max(from, to)].map(t => Math.min(Math.max(t || 0, 0), data.duration));
  const whole = to - from < .05;
  restart(() => Object.assign(state, { from: whole ? 0 : from, to: whole ? data.duration : to, loop: !whole }));
}

function tempo(part) { restart(() => { state.tempo = Math.min(1.5, Math.max(.5, Math.round(part * 20) / 20)); }); }

function level() {
  if (!graph) return -Infinity;
  const x = new Float32Array(graph.meter.fftSize);
  graph.meter.getFloatTimeDomainData(x);
  return 10 * Math.log10(x.reduce((sum, v) => sum + v * v, 0) / x.length);
}

function balance() {
  if (!graph) return;
  const now = gains(sets, state), t = context.currentTime;
  graph.out.gain.setTargetAtTime(state.volume, t, .01);
  for (const part of graph.parts) {
    part.level.gain.setTargetAtTime(now[part.i][part.k], t, .01);
    part.place.pan.setTargetAtTime(state.tracks[part.stem.name].pan, t, .01);
  }
}

// What is heard now, the whole song long, as [left, right], and the gain that kept it below full scale.
async function mixdown(report) {
  const set = sets[state.set], hop = hopOf(data.rate), now = gains(sets, state)[state.set];
  const pairs = state.tempo === 1 ? null : [];
  if (pairs) for (const pair of hopsOf(set, { at: 0, loop: false, tempo: state.tempo })) {
    pairs.push(pair);
    if (pairs.length % 200 === 0) await report(pairs.length * hop / data.rate * state.tempo / data.duration / 2);
  }
  const length = pairs ? pairs.length * hop : Math.round(data.duration * data.rate);
  const out = [new Float32Array(length), new Float32Array(length)];
  for (const [k, stem] of set.stems.entries()) {
    if (now[k]) add(out, stem.buffer, pairs, now[k], panned(state.tracks[stem.name].pan));
    await report(.5 + .5 * (k + 1) / set.stems.length);
  }
  const peak = out.reduce((high, x) => x.reduce((a, v) => Math.max(a, Math.abs(v)), high), 0);
  const gain = peak > 1 ? .999 / peak : 1;
  if (gain < 1) for (const x of out) for (let i = 0; i < length; i++) x[i] *= gain;
  return { channels: out, gain };
}

function add([left, right], buffer, pairs, gain, [ll, lr, rl, rr]) {
  const channel = c => {
    const x = buffer.getChannelData(Math.min(c, buffer.numberOfChannels - 1));
    return pairs ? rendered(x, pairs, hopOf(data.rate)) : x;
  };
  const a = channel(0), b = channel(1);
  for (let i = 0; i < Math.min(left.length, a.length); i++) {
    left[i] += gain * (ll * a[i] + rl * b[i]);
    right[i] += gain * (lr * a[i] + rr * b[i]);
  }
}
