// The page "Try it": everything happens in this tab.
const base = new URL(".", import.meta.url), $ = id => document.getElementById(id), RATE = 44100;
const live = { about: null, files: null, worker: null, ready: null, run: 0, timings: {} };
window.live = live;

const words = {
  wasm: "This browser can't run WebAssembly with SIMD, which the separation needs. Any browser since 2023 can.",
  decode: "This browser can't decode that file. It takes what it can play: mp3, wav, flac, ogg, m4a.",
  memory: "There is too little memory in this tab for a song of that length. A shorter one will do.",
  silent: "There is no sound in that file.",
  network: "A part of this page could not be loaded. Go online once, then load the page again.",
};

function say(text, trouble = false) { $("live-status").textContent = text; $("live").classList.toggle("trouble", trouble); }
function show(...names) { for (const node of document.querySelectorAll("#live [data-when]")) node.hidden = !node.dataset.when.split(" ").some(x => names.includes(x)); }
function fail(text) { stop(); show("choose"); say(text, true); }
function minutes(s) { return s < 90 ? Math.max(1, Math.round(s)) + " s" : Math.round(s / 60) + " min"; }

// What the tab needs is fetched once and kept, so that it works offline from then on.
async function fetched(name, how) {
  const answer = await fetch(new URL(name, base));
  if (!answer.ok) throw new Error(words.network);
  return answer[how]();
}

function simd() {
  const tiny = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(tiny));
}

async function prepare() {
  live.about = await fetched("about.json", "json");
  if (!live.about.ready) { show("unbuilt"); return say("This copy of the site was built without the live page: " + live.about.missing + "."); }
  if (!simd()) return say(words.wasm, true);
  const names = [["worker.js", "blob"], ["ort.wasm.bundle.min.mjs", "blob"], ["ort-wasm-simd-threaded.wasm", "arrayBuffer"], ["default.onnx", "arrayBuffer"], ["funk.flac", "arrayBuffer"], ["toy.flac", "arrayBuffer"], ["desk.html.txt", "text"]];
  const [worker, runtime, wasm, model, funk, toy, desk] = await Promise.all(names.map(([name, how]) => fetched(name, how)));
  const script = blob => URL.createObjectURL(new Blob([blob], { type: "text/javascript" }));
  live.files = { worker: script(worker), runtime: script(runtime), wasm, model, funk, toy, desk };
  start();
}

function start() {
  live.worker = new Worker(live.files.worker, { type: "module" });
  live.ready = new Promise((resolve, reject) => {
    live.worker.onmessage = ({ data }) => data.kind === "ready" ? resolve() : reject(new Error(data.text));
    live.worker.onerror = error => reject(new Error(error.message || words.wasm));
  });
  live.ready.catch(() => {});
  const { wasm, model } = live.files, threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const runtime = threads > 1 ? new URL("ort.wasm.bundle.min.mjs", base).href : live.files.runtime;
  live.worker.postMessage({ kind: "open", runtime, wasm, model, threads });
}

function stop() { live.run++; live.worker?.terminate(); live.worker = null; live.ready = null; }

async function decode(bytes) {
  let buffer;
  try { buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes); } catch { throw new Error(words.decode); }
  const song = buffer.numberOfChannels > 2 ? sound([0, 1].map(k => buffer.getChannelData(k))) : buffer;
  if (!song.length || loudest(song) === 0) throw new Error(words.silent);
  return song;
}

// The chunks, contexts and cross-fades are those of the package's Separator.
function plan(about) {
  const [chunk, context, hop] = ["chunk", "context", "hop"].map(k => Number(about[k]));
  const shared = Math.max(Math.round(chunk * Number(about.overlap)), 2 * context);
  return { chunk, context, hop, step: Math.floor((chunk - shared) / hop) * hop };
}

function starts(samples, { chunk, step, hop }) {
  const places = [];
  let at = 0;
  for (; samples > at + chunk; at += step) places.push(at);
  return [...places, Math.max(0, Math.ceil((samples - chunk) / hop) * hop)];
}

function weights(length, { chunk, step, context }, first, last) {
  const width = chunk - step - 2 * context, out = new Float32Array(length).fill(1);
  const side = i => i < context ? 0 : i < context + width ? (i - context + 1) / (width + 1) : 1;
  for (let i = 0; i < length; i++) out[i] = Math.min(first ? 1 : side(i), last ? 1 : side(chunk - 1 - i));
  return out;
}

function chunk(input, shape) {
  return new Promise((resolve, reject) => {
    live.worker.onmessage = ({ data }) => data.kind === "stems" ? resolve(data.stems) : reject(new Error(/memory|alloc/i.test(data.text) ? words.memory : data.text));
    live.worker.onerror = error => reject(new Error(/memory/i.test(error.message) ? words.memory : error.message));
    live.worker.postMessage({ kind: "run", input, shape }, [input.buffer]);
  });
}

// A buffer for each stem, filled chunk by chunk; nothing of a song is held twice.
async function separated(song, run) {
  const about = live.about.model, names = about.sources.split(","), samples = song.length, settings = plan(about), c = song.numberOfChannels, began = performance.now();
  const places = starts(samples, settings), total = new Float32Array(samples);
  const sounds = Object.fromEntries(names.map(name => [name, new AudioBuffer({ numberOfChannels: c, length: samples, sampleRate: RATE })]));
  for (const [n, at] of places.entries()) {
    const length = at ? settings.chunk : Math.min(settings.chunk, samples), end = Math.min(length, samples - at);
    const input = new Float32Array(2 * length), weight = weights(length, settings, n === 0, n === places.length - 1);
    for (const k of [0, 1]) input.set(song.getChannelData(k % c).subarray(at, at + end), k * length);
    const found = await chunk(input, [1, 2, length]);
    if (run !== live.run) return null;
    names.forEach((name, s) => { for (const k of [0, 1]) add(sounds[name].getChannelData(k % c).subarray(at, at + end), found.subarray((2 * s + k) * length), weight, c / 2); });
    for (let i = 0; i < end; i++) total[at + i] += weight[i];
    report((n + 1) / places.length, (performance.now() - began) / 1000);
  }
  for (const name of names) for (let k = 0; k < c; k++) { const x = sounds[name].getChannelData(k); for (let i = 0; i < samples; i++) x[i] /= total[i]; }
  return { names, sounds, seconds: (performance.now() - began) / 1000 };
}

function add(out, y, weight, share) { for (let i = 0; i < out.length; i++) out[i] += y[i] * weight[i] * share; }

function report(done, seconds) {
  $("live-bar").value = done;
  if (done < 1) say(`separating, ${Math.round(100 * done)} % done, about ${minutes(seconds * (1 - done) / done)} left`);
}

async function take(name, bytes) {
  const run = ++live.run, began = performance.now();
  show("work"); $("live-bar").removeAttribute("value"); say("reading " + name);
  try {
    const song = await decode(bytes);
    if (run !== live.run) return;
    if (!live.files) { say("loading the separator"); await live.loading; }
    if (!live.worker) start();
    say("starting the separator"); await live.ready;
    if (run !== live.run) return;
    say("separating " + name);
    const result = await separated(song, run);
    if (run !== live.run || !result) return;
    live.timings = { seconds: result.seconds, song: song.duration, whole: (performance.now() - began) / 1000 };
    stop(); live.run = run;
    hear(name, song, result);
  } catch (error) { if (run === live.run) fail(error instanceof RangeError ? words.memory : error.message); }
}

function sound(channels) {
  const buffer = new AudioBuffer({ numberOfChannels: channels.length, length: channels[0].length, sampleRate: RATE });
  channels.forEach((x, c) => buffer.copyToChannel(x, c));
  return buffer;
}

function hear(name, song, { names, sounds, seconds }) {
  sounds.mixture = song;
  const title = name.replace(/\.[^.]*$/, "") || "song", peak = Math.max(...names.map(stem => loudest(sounds[stem])));
  live.gain = Math.min(1, .999 / peak); live.sounds = sounds; live.title = title;
  window.given = { buffer: stem => sounds[stem.name], gain: live.gain };
  const sets = [{ name: "separated", stems: names.map(stem => ({ name: stem, note: "" })) }, { name: "the song", stems: [{ name: "mixture", note: "" }] }];
  const data = { sets, rate: RATE, duration: song.duration, format: "wav", gain: 1, title, colors: live.about.colors };
  const safe = text => text.replace(/[&<>"']/g, x => `&#${x.charCodeAt(0)};`);
  const page = live.files.desk.replaceAll("{title}", () => safe(title)).replace("{data}", () => JSON.stringify(data).replaceAll("<", "\\u003c"));
  const frame = Object.assign(document.createElement("iframe"), { title: "Listening desk", allow: "autoplay", srcdoc: page });
  $("live-desk").replaceChildren(frame); show("done");
  say(`${title[0].toUpperCase()}${title.slice(1)} came apart in ${seconds.toFixed(1)} s, ${(song.duration / seconds).toFixed(1)} times as fast as it plays`);
  frame.addEventListener("load", () => begin(frame, live.run), { once: true });
}

// The song that somebody asked for begins to play; where the browser forbids it, the desk waits for its button.
async function begin(frame, run) {
  frame.focus();
  const { desk } = frame.contentWindow;
  while (run === live.run && !desk.state.ready) await new Promise(resolve => setTimeout(resolve, 20));
  if (run === live.run) desk.play();
}

function loudest(buffer) { let peak = 0; for (let c = 0; c < buffer.numberOfChannels; c++) for (const v of buffer.getChannelData(c)) if (Math.abs(v) > peak) peak = Math.abs(v); return peak; }

function choose(file) { if (file) file.arrayBuffer().then(bytes => take(file.name, bytes), () => fail(words.decode)); }

Object.assign(live, { take, words });
const zone = $("live");
$("live-file").onchange = event => { choose(event.target.files[0]); event.target.value = ""; };
async function sample(key, name) { try { if (!live.files) { show("work"); say("loading " + name); await live.loading; } if (live.files) take(name, live.files[key].slice(0)); } catch (error) { fail(error.message); } }
$("live-funk").onclick = () => sample("funk", "the funk band");
$("live-toy").onclick = () => sample("toy", "the toy band");
$("live-cancel").onclick = () => { stop(); show("choose"); say("cancelled"); if (live.files) start(); $("live-toy").focus(); };
$("live-again").onclick = () => { $("live-desk").replaceChildren(); live.sounds = null; window.given = null; stop(); show("choose"); say("Choose a song."); start(); $("live-toy").focus(); };
for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, event => { event.preventDefault(); zone.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, event => { event.preventDefault(); zone.classList.remove("over"); });
zone.addEventListener("drop", event => choose(event.dataTransfer.files[0]));
show("choose"); say("Nothing is uploaded: the song stays in this tab.");
live.loading = prepare().catch(error => { say(error.message === "Failed to fetch" ? words.network : error.message, true); throw error; });
live.loading.catch(() => {});
