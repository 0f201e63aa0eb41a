// Runs the network on one chunk after the other.
const state = { session: null, ort: null };

async function open({ runtime, wasm, model, threads }) {
  const ort = state.ort = await import(runtime);
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm;
  state.session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
}

async function run({ input, shape }) {
  const { stems } = await state.session.run({ mixture: new state.ort.Tensor("float32", input, shape) });
  return stems.data;
}

onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") { await open(data); postMessage({ kind: "ready" }); }
    if (data.kind === "run") { const stems = await run(data); postMessage({ kind: "stems", stems }, [stems.buffer]); }
  } catch (error) { postMessage({ kind: "error", text: String(error?.message ?? error) }); }
};
