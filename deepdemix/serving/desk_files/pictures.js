// Waveforms, spectrograms and the ruler, drawn for the part of the song in view.

function mono(buffer) {
  const out = Float32Array.from(buffer.getChannelData(0));
  if (buffer.numberOfChannels < 2) return out;
  const right = buffer.getChannelData(1);
  for (let i = 0; i < out.length; i++) out[i] = (out[i] + right[i]) / 2;
  return out;
}

function monoOf(stem) { return stem.mono = stem.mono || mono(stem.buffer); }

// The lowest, the highest and the effective (RMS) value behind each column of the picture.
function envelope(x, columns) {
  const [low, high, rms] = Array.from({ length: 3 }, () => new Float32Array(columns));
  const first = state.left * data.rate, width = (state.right - state.left) * data.rate / columns;
  for (let c = 0; c < columns; c++) {
    const begin = Math.floor(first + c * width), end = Math.min(Math.max(begin + 1, Math.floor(first + (c + 1) * width)), x.length);
    if (begin >= end) continue;
    let power = 0;
    low[c] = high[c] = x[begin];
    for (let i = begin; i < end; i++) {
      const v = x[i];
      if (v < low[c]) low[c] = v;
      if (v > high[c]) high[c] = v;
      power += v * v;
    }
    rms[c] = Math.sqrt(power / (end - begin));
  }
  return { low, high, rms };
}

function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
  }
  for (let size = 2; size <= n; size *= 2) for (let k = 0; k < size / 2; k++) {
    const c = Math.cos(2 * Math.PI * k / size), s = -Math.sin(2 * Math.PI * k / size);
    for (let a = k; a < n; a += size) {
      const b = a + size / 2, r = re[b] * c - im[b] * s, q = re[b] * s + im[b] * c;
      re[b] = re[a] - r; im[b] = im[a] - q;
      re[a] += r; im[a] += q;
    }
  }
}

function decibels(x, centre, n) {
  const re = new Float32Array(n), im = new Float32Array(n), out = new Float32Array(n / 2);
  for (let i = 0; i < n; i++) re[i] = (x[centre - n / 2 + i] || 0) * (.5 - .5 * Math.cos(2 * Math.PI * i / n));
  fft(re, im);
  for (let k = 0; k < n / 2; k++) out[k] = 10 * Math.log10((re[k] ** 2 + im[k] ** 2) * 16 / n ** 2 + 1e-12);
  return out;
}

function sized(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  return [canvas.getContext("2d"), canvas.width, canvas.height, ratio];
}

function paint(canvas, stem) {
  const [pen, w, h] = sized(canvas);
  state.view === "waveform" ? waves(pen, stem, w, h) : spectra(pen, stem, w, h);
}

// One scale for all stems, so that a quiet one looks quiet, and one for mixtures.
function scale(whole) {
  const alike = sets.flatMap(set => set.stems).filter(stem => (stem.name === "mixture") === whole);
  for (const stem of alike) stem.peak ??= monoOf(stem).reduce((a, v) => Math.max(a, Math.abs(v)), 0);
  return Math.max(1e-4, ...alike.map(stem => stem.peak));
}

// Peaks in a lighter shade, and within them how loud the sound is.
function waves(pen, stem, w, h) {
  const { low, high, rms } = envelope(monoOf(stem), w), k = h * .46 / scale(stem.name === "mixture");
  const bar = (c, top, bottom) => pen.fillRect(c, h / 2 - top * k, 1, Math.max(1, (top - bottom) * k));
  pen.fillStyle = color(stem.name);
  pen.globalAlpha = .45;
  for (let c = 0; c < w; c++) bar(c, high[c], low[c]);
  pen.globalAlpha = 1;
  for (let c = 0; c < w; c++) bar(c, Math.min(rms[c], high[c]), Math.max(-rms[c], low[c]));
}

// From 0 Hz to half the rate, more room for the low half, over 70 dB.
function spectra(pen, stem, w, h) {
  const wide = Math.min(w, 700), tall = Math.min(h, 160), n = 2048, picture = new ImageData(wide, tall);
  const ink = color(stem.name).match(/\w\w/g).map(x => parseInt(x, 16)), x = monoOf(stem);
  for (let c = 0; c < wide; c++) {
    const t = state.left + (c + .5) / wide * (state.right - state.left);
    const db = decibels(x, Math.round(t * data.rate), n);
    for (let y = 0; y < tall; y++) {
      const low = Math.floor((1 - (y + 1) / tall) ** 2 * n / 2);
      const high = Math.max(low + 1, Math.floor((1 - y / tall) ** 2 * n / 2));
      let top = -120;
      for (let f = low; f < high; f++) top = Math.max(top, db[f]);
      const strength = Math.min(1, Math.max(0, (top + 80) / 70)) ** 1.3;
      picture.data.set([...ink, 255 * strength], (y * wide + c) * 4);
    }
  }
  const small = Object.assign(document.createElement("canvas"), { width: wide, height: tall });
  small.getContext("2d").putImageData(picture, 0, 0);
  pen.drawImage(small, 0, 0, w, h);
}

function ruler() {
  const [pen, w, h, ratio] = sized($("ruler").querySelector("canvas")), seconds = state.right - state.left;
  const by = step(seconds, Math.max(2, w / ratio / 80)), digits = by < .1 ? 2 : by < 1 ? 1 : 0;
  const ink = getComputedStyle(document.body).getPropertyValue("--soft");
  Object.assign(pen, { fillStyle: ink, font: `${11 * ratio}px system-ui, sans-serif`, textBaseline: "middle" });
  for (let i = Math.ceil(state.left / by); i * by <= state.right; i++) {
    const t = i * by, x = (t - state.left) / seconds * w, rest = (t % 60).toFixed(digits);
    pen.fillRect(x, h * .55, ratio, h * .45);
    pen.fillText(`${Math.floor(t / 60)}:${rest.padStart(digits ? 3 + digits : 2, "0")}`, x + 4 * ratio, h * .5);
  }
}

function color(name) {
  const known = name !== "mixture" && data.colors[name];
  return known || (matchMedia("(prefers-color-scheme: dark)").matches ? "#aaa49a" : data.colors.mixture);
}

function draw() {
  if (!state.ready) return;
  ruler();
  for (const row of document.querySelectorAll(".row:not([hidden])"))
    paint(row.querySelector("canvas"), sets[state.set].stems.find(stem => stem.name === row.dataset.stem));
}
