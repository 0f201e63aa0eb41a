// The page: rows of tracks, every control and every key, in line with the state.

function make(tag, settings = {}, ...children) {
  const { dataset, attributes, ...rest } = settings, node = Object.assign(document.createElement(tag), rest);
  Object.assign(node.dataset, dataset || {});
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function button(className, label, keys, onclick) {
  const attributes = { "aria-label": label, ...(keys ? { "aria-keyshortcuts": keys } : {}) };
  return make("button", { type: "button", className, onclick, attributes });
}

// What a slider's `aria-valuetext` says, for those who see it: as a live region it would be read out at every change.
function hiddenText() { return make("span", { className: "value", attributes: { "aria-hidden": true } }); }

function slider(className, word, label, limits, change) {
  const input = make("input", { type: "range", ...limits, value: 0, attributes: { "aria-label": label } });
  input.oninput = () => { change(+input.value); apply(); };
  input.ondblclick = () => { input.value = 0; input.oninput(); };
  return make("div", { className: "slider " + className }, make("span", { textContent: word }), input, hiddenText());
}

function row(name, i) {
  const track = state.tracks[name], key = i < 9 ? i + 1 : null;
  const flip = what => () => { track[what] = !track[what]; apply(); };
  const mute = button("mute", "Mute " + name, key, flip("mute"));
  const solo = button("solo", "Solo " + name, key && "Shift+" + key, flip("solo"));
  const save = button("save", "Download " + name, null, () => saveTrack(name));
  save.textContent = "Save";
  const volume = slider("gain", "Volume", `Volume of ${name}, in decibels`, { min: -40, max: 6, step: .5 },
    value => { track.db = value; });
  const pan = slider("pan", "Pan", `Pan of ${name}, left to right`, { min: -1, max: 1, step: .05 },
    value => { track.pan = value; });
  pan.querySelector("input").className = "centred";
  const number = key ? [make("kbd", { textContent: key })] : [];
  const switches = make("div", { className: "switches" }, mute, solo, save);
  const head = make("div", { className: "head" }, ...number, make("b", { textContent: name }), switches);
  const canvas = make("canvas", { attributes: { role: "img" } });
  const marks = ["note", "region", "cursor"].map(className => make("div", { className }));
  const lane = make("div", { className: "lane" }, canvas, ...marks);
  const controls = make("div", { className: "controls" }, head, volume, pan);
  const li = make("li", { className: "row columns", dataset: { stem: name } }, controls, lane);
  li.style.setProperty("--stem", color(name));
  drag(lane);
  return li;
}

function timeAt(lane, e) {
  const box = lane.getBoundingClientRect();
  return state.left + (e.clientX - box.left) / box.width * (state.right - state.left);
}

function drag(lane) {
  let begin = null;
  lane.onpointerdown = e => {
    if (e.button !== 0) return;
    begin = { x: e.clientX, t: timeAt(lane, e) };
    lane.setPointerCapture(e.pointerId);
  };
  lane.onpointerup = e => {
    if (begin) Math.abs(e.clientX - begin.x) > 5 ? region(begin.t, timeAt(lane, e)) : go(begin.t);
    begin = null;
  };
  lane.onpointercancel = () => { begin = null; };
  lane.addEventListener("wheel", e => {
    const sideways = e.shiftKey ? e.deltaY || e.deltaX : Math.abs(e.deltaX) > Math.abs(e.deltaY) ? e.deltaX : 0;
    if (e.ctrlKey) zoom(2 ** (e.deltaY / 200), timeAt(lane, e));
    else if (sideways && state.right - state.left < data.duration) scroll(sideways / 800 * (state.right - state.left));
    else return;
    e.preventDefault();
  }, { passive: false });
}

// What is in view

let seen = true;

function inView(t) { return t >= state.left && t <= state.right; }

function look([left, right]) {
  Object.assign(state, { left, right });
  seen = inView(position());
  apply();
  draw();
}

function zoom(factor, around) {
  const t = position(), middle = (state.left + state.right) / 2;
  look(zoomed(state.left, state.right, around ?? (inView(t) ? t : middle), factor, data.duration));
}

function scroll(by) { look(moved(state.left, state.right, by, data.duration)); }

function whole() { look([0, data.duration]); }

// The view goes along with the cursor, unless somebody has scrolled away from it.
function follow(t) {
  if (seen && !inView(t)) scroll(t - state.left);
}

function goTo(t) { seen = true; go(t); follow(position()); }

// Files

function keep(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function say(text) { if ($("status").textContent !== text) $("status").textContent = text; }

async function saving(what, work) {
  const buttons = [$("save-mix"), $("save-all")];
  buttons.forEach(b => { b.disabled = true; });
  const report = async part => {
    say(`saving ${what}: ${Math.round(100 * part)} %`);
    await new Promise(resolve => setTimeout(resolve));
  };
  try { say(await work(report)); } catch (error) { say(`${what} can't be saved: ${error.message}`); }
  buttons.forEach(b => { b.disabled = false; });
}

function trackName(set, name) { return fileName(data.title, set.name, name) + "." + data.format; }

function saveTrack(name) {
  const set = sets[state.set], stem = set.stems.find(s => s.name === name);
  return saving(name, async () => {
    keep(new Blob([await fileOf(stem)]), trackName(set, name));
    return `saved ${name} of ${set.name}`;
  });
}

function saveAll() {
  const set = sets[state.set];
  return saving("all tracks", async report => {
    const files = [];
    for (const [i, stem] of set.stems.entries()) {
      files.push({ name: `${fileName(stem.name)}.${data.format}`, bytes: await fileOf(stem) });
      await report((i + 1) / set.stems.length);
    }
    keep(new Blob(zip(files), { type: "application/zip" }), fileName(data.title, set.name) + ".zip");
    return `saved ${files.length} ${files.length > 1 ? "tracks" : "track"} of ${set.name}`;
  });
}

function saveMix() {
  const title = fileName(data.title, sets[state.set].name, "mix");
  return saving("this mix", async report => {
    const { channels, gain } = await mixdown(report);
    keep(new Blob([wav(channels, data.rate)], { type: "audio/wav" }), title + ".wav");
    const down = gain < 1 ? `, ${(-20 * Math.log10(gain)).toFixed(1)} dB lower so that it does not clip` : "";
    return "saved this mix" + down;
  });
}

// From the state to the page

function choice(set, i) {
  const onchange = () => { state.set = i; apply(); draw(); };
  return make("label", {}, make("input", { type: "radio", name: "set", value: i, checked: i === 0, onchange }), set.name);
}

function press(node, on, text) {
  node.setAttribute("aria-pressed", on);
  node.textContent = text;
}

function applyRow(li, set, sounding) {
  const name = li.dataset.stem, track = state.tracks[name], k = set.stems.findIndex(stem => stem.name === name);
  li.hidden = k < 0;
  li.classList.toggle("silent", k >= 0 && !sounding[k]);
  press(li.querySelector(".mute"), track.mute, track.mute ? "Muted" : "Mute");
  press(li.querySelector(".solo"), track.solo, track.solo ? "Soloed" : "Solo");
  li.querySelector(".note").textContent = k >= 0 && set.stems[k].note || "";
  const db = track.db <= -40 ? "off" : (track.db > 0 ? "+" : "") + track.db.toFixed(1) + " dB";
  for (const [what, text] of [["gain", db], ["pan", panText(track.pan)]]) {
    li.querySelector(`.${what} .value`).textContent = text;
    li.querySelector(`.${what} input`).setAttribute("aria-valuetext", text);
  }
  li.querySelector("canvas").setAttribute("aria-label", `The ${state.view} of ${name} in ${set.name}`);
}

function applyView() {
  const all = state.right - state.left >= data.duration - 1e-6;
  $("view").textContent = state.view === "waveform" ? "Show spectrograms" : "Show waveforms";
  $("zoom-out").disabled = $("zoom-all").disabled = $("scrolling").hidden = all;
  $("scroll").max = data.duration - (state.right - state.left);
  $("scroll").value = state.left;
  $("scroll").setAttribute("aria-valuetext", `from ${state.left.toFixed(1)} to ${state.right.toFixed(1)} seconds`);
}

function spoken(set, sounding) {
  const heard = set.stems.filter((_, k) => sounding[k]).map(stem => stem.name), all = set.stems.length;
  const what = heard.length === all ? (all > 1 ? "all tracks" : "one track") : heard.join(", ") || "nothing";
  const slow = state.tempo === 1 ? "" : ` at ${Math.round(state.tempo * 100)} % tempo`;
  return `${state.playing ? "playing" : "paused, ready to play"} ${what} of ${set.name}${slow}`;
}

function apply() {
  const set = sets[state.set], sounding = audible(set.stems.map(stem => stem.name), state.tracks);
  balance();
  document.querySelectorAll("#sets input").forEach((input, i) => { input.checked = i === state.set; });
  document.querySelectorAll(".row").forEach(li => applyRow(li, set, sounding));
  press($("loop"), state.loop, state.loop ? "Loop is on" : "Loop is off");
  $("play").textContent = state.playing ? "Pause" : "Play";
  for (const id of ["play", "save-mix", "save-all"]) $(id).disabled = !state.ready;
  $("from").value = state.from.toFixed(2);
  $("to").value = state.to.toFixed(2);
  $("tempo").value = Math.round(state.tempo * 100);
  $("tempo-text").textContent = $("tempo").value + " %";
  $("tempo").setAttribute("aria-valuetext", $("tempo-text").textContent);
  $("sets").hidden = sets.length < 2;
  if (state.ready) say(spoken(set, sounding));
  applyView();
  cursor();
}

function cursor() {
  const t = position(), part = x => 100 * (x - state.left) / (state.right - state.left);
  const all = state.from <= 0 && state.to >= data.duration;
  for (const mark of document.querySelectorAll(".cursor")) {
    mark.style.left = part(t) + "%";
    mark.hidden = !inView(t);
  }
  for (const mark of document.querySelectorAll(".region")) {
    mark.hidden = all;
    mark.classList.toggle("off", !state.loop);
    mark.style.left = part(state.from) + "%";
    mark.style.width = part(state.to) - part(state.from) + "%";
  }
  $("clock").textContent = clock(t) + " / " + clock(data.duration);
  if (document.activeElement !== $("position") || state.playing) $("position").value = t;
  $("position").setAttribute("aria-valuetext", `${t.toFixed(1)} of ${data.duration.toFixed(1)} seconds`);
  $("level").value = Math.max(-60, level());
}

// Keys

function view() { state.view = state.view === "waveform" ? "spectrogram" : "waveform"; apply(); draw(); }
function next() { state.set = (state.set + 1) % sets.length; apply(); draw(); }
function loop() { restart(() => { state.loop = !state.loop; }); }
function toggle() { state.playing ? pause() : play(); }

const jobs = {
  Space: toggle, KeyL: loop, KeyW: view, KeyS: next,
  KeyE: e => state.ready && (e.shiftKey ? saveAll() : saveMix()),
  Home: () => goTo(0), ArrowLeft: () => goTo(position() - 1), ArrowRight: () => goTo(position() + 1),
  BracketLeft: () => region(position(), state.to > position() ? state.to : data.duration),
  BracketRight: () => region(state.from < position() ? state.from : 0, position()),
  Comma: () => tempo(state.tempo - .05), Period: () => tempo(state.tempo + .05), Slash: () => tempo(1),
  Digit0: whole, Numpad0: whole,
  Equal: () => zoom(.5), NumpadAdd: () => zoom(.5), Minus: () => zoom(2), NumpadSubtract: () => zoom(2),
};
const signs = { "+": "Equal", "-": "Minus", ",": "Comma", ".": "Period", "/": "Slash", "[": "BracketLeft", "]": "BracketRight" };

function key(e) {
  const inside = e.target.closest && e.target.closest("button, a, input, summary"), kind = inside && inside.type;
  if (e.ctrlKey || e.metaKey || e.altKey || kind === "number") return;
  const code = signs[e.key] || e.code, number = /^(Digit|Numpad)([1-9])$/.exec(code);
  if (code === "Space" && inside && kind !== "range") return;
  if (/Arrow|Home/.test(code) && (kind === "range" || kind === "radio")) return;
  const track = number && state.tracks[names[number[2] - 1]];
  if (track) { const what = e.shiftKey ? "solo" : "mute"; track[what] = !track[what]; apply(); }
  else if (jobs[code]) jobs[code](e);
  else return;
  e.preventDefault();
}

function frame() {
  if (state.playing) {
    if (!state.loop && position() >= data.duration) { pause(); state.at = 0; apply(); }
    else { follow(position()); cursor(); }
  }
  requestAnimationFrame(frame);
}

// Within another page the frame is as tall as the desk.
function stretch() {
  const height = document.querySelector("main").getBoundingClientRect().height;
  try { if (window.frameElement) window.frameElement.style.height = Math.ceil(height) + 1 + "px"; } catch {}
}

// After a click the focus goes back to the page, so that the space bar plays.
function release(e) {
  const node = e.target.closest("button, a, [type=radio], [type=range]");
  if (node && e.detail > 0) node.blur();
}

function start() {
  $("sets").append(...sets.map(choice));
  $("rows").append(...names.map(row));
  $("position").max = $("from").max = $("to").max = data.duration;
  $("remarks").textContent = (data.remarks || []).join(" ");
  const clicks = { play: toggle, start: () => goTo(0), loop, view, "zoom-in": () => zoom(.5), "zoom-out": () => zoom(2),
    "zoom-all": whole, "save-mix": saveMix, "save-all": saveAll };
  for (const [id, job] of Object.entries(clicks)) $(id).onclick = job;
  $("position").oninput = e => goTo(+e.target.value);
  $("volume").oninput = e => { state.volume = +e.target.value; balance(); };
  $("tempo").oninput = e => tempo(+e.target.value / 100);
  $("tempo").ondblclick = () => tempo(1);
  $("scroll").oninput = e => scroll(+e.target.value - state.left);
  $("from").onchange = $("to").onchange = () => region(+$("from").value, +$("to").value);
  document.addEventListener("keydown", key);
  document.addEventListener("click", release);
  new ResizeObserver(draw).observe($("rows"));
  new ResizeObserver(stretch).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  apply();
  const failed = e => say("this browser can't open the sound: " + e.message);
  open().then(() => { apply(); draw(); requestAnimationFrame(frame); }, failed);
}

window.desk = { state, sets, level, position, gains: () => gains(sets, state), play, pause, go, region, tempo, zoom, apply };
start();
