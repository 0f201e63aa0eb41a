// Files made in the page: WAV with 24 bits, and ZIP without compression.

function wav(channels, rate) {
  const count = channels.length, frames = channels[0].length, size = frames * count * 3;
  const out = new Uint8Array(44 + size), view = new DataView(out.buffer);
  const text = (at, words) => [...words].forEach((letter, i) => { out[at + i] = letter.charCodeAt(0); });
  text(0, "RIFF"); view.setUint32(4, 36 + size, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, count, true);
  view.setUint32(24, rate, true); view.setUint32(28, rate * count * 3, true);
  view.setUint16(32, count * 3, true); view.setUint16(34, 24, true);
  text(36, "data"); view.setUint32(40, size, true);
  for (let i = 0, at = 44; i < frames; i++) for (const x of channels) {
    const value = Math.max(-8388608, Math.min(8388607, Math.round(x[i] * 8388608)));
    out[at++] = value & 255; out[at++] = value >> 8 & 255; out[at++] = value >> 16 & 255;
  }
  return out;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ n >>> 1 : n >>> 1;
  return n;
});

function crc(bytes) {
  let c = ~0;
  for (let i = 0; i < bytes.length; i++) c = CRC[(c ^ bytes[i]) & 255] ^ c >>> 8;
  return ~c >>> 0;
}

// `files`: [{ name, bytes }]; the parts of an archive, for a Blob.
function zip(files) {
  const parts = [], directory = [];
  let at = 0;
  for (const { name, bytes } of files) {
    const title = new TextEncoder().encode(name), sum = crc(bytes);
    const header = (signature, length) => {
      const view = new DataView(new ArrayBuffer(length)), shift = length === 46 ? 2 : 0;
      view.setUint32(0, signature, true); view.setUint16(4, 20, true); view.setUint16(4 + shift, 20, true);
      view.setUint16(6 + shift, 0x800, true); view.setUint16(12 + shift, 0x21, true);
      view.setUint32(14 + shift, sum, true); view.setUint32(18 + shift, bytes.length, true);
      view.setUint32(22 + shift, bytes.length, true); view.setUint16(26 + shift, title.length, true);
      if (shift) view.setUint32(42, at, true);
      return new Uint8Array(view.buffer);
    };
    directory.push(header(0x02014b50, 46), title);
    parts.push(header(0x04034b50, 30), title, bytes);
    at += 30 + title.length + bytes.length;
    if (at > 0xffffffff) throw new Error("more than 4 GB do not fit into a ZIP archive: save the tracks one by one");
  }
  const end = new DataView(new ArrayBuffer(22)), size = directory.reduce((n, x) => n + x.length, 0);
  end.setUint32(0, 0x06054b50, true); end.setUint16(8, files.length, true); end.setUint16(10, files.length, true);
  end.setUint32(12, size, true); end.setUint32(16, at, true);
  return [...parts, ...directory, new Uint8Array(end.buffer)];
}

function fileName(...parts) { return parts.join(" - ").replace(/[^\p{L}\p{N} ._()-]/gu, "_"); }
