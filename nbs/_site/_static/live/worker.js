// Separates one song: the chunks, contexts and cross-fades are those of the package's Separator.
const state = { session: null, about: null, ort: null };

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

async function open({ runtime, wasm, model, about, threads }) {
  const ort = state.ort = await import(runtime);
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm;
  state.about = about;
  state.session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
}

async function separate(song) {
  const { session, about, ort } = state, names = about.sources.split(","), samples = song[0].length, settings = plan(about);
  const places = starts(samples, settings), began = performance.now();
  const stems = names.map(() => song.map(() => new Float32Array(samples))), total = new Float32Array(samples);
  for (const [n, at] of places.entries()) {
    const length = at ? settings.chunk : Math.min(settings.chunk, samples), end = Math.min(length, samples - at);
    const input = new Float32Array(song.length * length), weight = weights(length, settings, n === 0, n === places.length - 1);
    song.forEach((x, c) => input.set(x.subarray(at, at + end), c * length));
    const { stems: result } = await session.run({ mixture: new ort.Tensor("float32", input, [1, song.length, length]) });
    stems.forEach((stem, s) => stem.forEach((out, c) => {
      const from = (s * song.length + c) * length, y = result.data;
      for (let i = 0; i < end; i++) out[at + i] += y[from + i] * weight[i];
    }));
    for (let i = 0; i < end; i++) total[at + i] += weight[i];
    result.dispose?.();
    postMessage({ kind: "progress", done: (n + 1) / places.length, seconds: (performance.now() - began) / 1000 });
  }
  for (const stem of stems) for (const out of stem) for (let i = 0; i < samples; i++) out[i] /= total[i];
  postMessage({ kind: "done", names, stems, seconds: (performance.now() - began) / 1000 }, stems.flat().map(x => x.buffer));
}

onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") { await open(data); postMessage({ kind: "ready" }); }
    if (data.kind === "separate") await separate(data.song);
  } catch (error) { postMessage({ kind: "error", text: String(error?.message ?? error) }); }
};
