// The model in a worker, so that the page never waits for it. It reads and writes texts over the
// key-value cache of the WebAssembly module as Decoder.run in tinygpt/inference/decoder.py does.

const PAUSE = 30; // milliseconds between two messages to the page, each of which it draws anew

class Model {
  constructor(exports, layout) {
    const view = (Type, address, length) => new Type(exports.memory.buffer, address, length);
    Object.assign(this, layout, { exports, cached: [] }); // ids whose keys and values are cached
    this.token = view(Int32Array, layout.token, 1);
    this.tokens = view(Int32Array, layout.tokens, layout.chunk);
    this.parameters = view(Float32Array, layout.parameters, 5);
    this.seen = view(Uint8Array, layout.seen, layout.vocab_size);
    this.probabilities = view(Float32Array, layout.probabilities, layout.vocab_size);
    this.likeliest = view(Int32Array, layout.likeliest, layout.listed);
    this.attention = view(Float32Array, layout.attention,
      layout.n_layer * layout.n_head * layout.block_size);
  }

  // The number of ids at the beginning of a window that are cached.
  countCached(window) {
    let n = 0;
    while (n < window.length && window[n] === this.cached[n]) n++;
    return n;
  }

  // Computes the logits after a window of at most block_size ids.
  read(window) {
    const n = window.length, T = this.chunk;
    const cached = Math.min(this.countCached(window), n - 1);
    if (n - cached === 1 && n > 1) return this.readLast(window);
    for (let begin = cached; begin < n - T; begin += T) this.readChunk(window, begin, T);
    const begin = Math.max(0, n - T); // the last chunk may overlap what is cached
    this.readChunk(window, begin, n - begin);
    this.cached = window.slice(); // a chunk may have written beyond its end
  }

  // The same where all of the window but its last id is cached; and writes its attention.
  readLast(window) {
    const n = window.length;
    this.token[0] = window[n - 1];
    this.exports.step(n - 1);
    if (this.countCached(window) < n) this.cached = window.slice();
  }

  readChunk(window, begin, length) {
    this.tokens.fill(0);
    this.tokens.set(window.slice(begin, begin + length));
    this.exports.prefill(begin, length - 1);
  }

  // Yields the ids of the tokens that follow ids; probabilities and likeliest are then those of that
  // place. With `again` nothing of the cache is used, so that the same seed gives the same text to
  // the last bit.
  *write(ids, options, again) {
    if (again) this.cached = [];
    this.parameters.set([options.temperature, options.top_k ?? 0, options.top_p ?? 0,
      options.min_p ?? 0, options.repetition_penalty]);
    this.seen.fill(0);
    for (const id of ids) if (id < this.vocab_size) this.seen[id] = 1;
    const hop = Math.min(options.window_hop, this.block_size);
    let window = ids.slice(-this.block_size);
    for (let n = ids.length; n < ids.length + options.max_new_tokens; n++) {
      if (window.length > this.block_size) window = window.slice(hop);
      this.read(window);
      const id = this.exports.sample(this.exports.make_key(options.seed, n));
      yield id;
      window.push(id);
    }
  }

  // What is known of id after ids, as a batch of one.
  predict(ids, id) {
    this.read(ids.slice(-this.block_size));
    this.exports.predict();
    const batch = new Batch();
    batch.push(id, this);
    return batch.message();
  }

  // How much the last of ids attends to itself and those before it in its window:
  // {heads: [[weights, ...] of each head, ...] of each layer, start}, weights begin at ids[start].
  lookBack(ids) {
    const window = ids.slice(-this.block_size), n = window.length;
    if (this.countCached(window) < n - 1) this.read(window.slice(0, -1));
    this.readLast(window);
    const weights = (layer, head) => {
      const begin = (layer * this.n_head + head) * this.block_size;
      return this.attention.slice(begin, begin + n);
    };
    const heads = Array.from({ length: this.n_layer }, (_, layer) =>
      Array.from({ length: this.n_head }, (_, head) => weights(layer, head)));
    return { heads, start: ids.length - n };
  }
}

// Tokens for the page, as few arrays: ids and probabilities of them, and of the likeliest tokens in
// the place of each, in falling order.
class Batch {
  ids = [];
  probabilities = [];
  likeliest = [];
  odds = []; // of the likeliest

  push(id, { probabilities, likeliest }) {
    this.ids.push(id);
    this.probabilities.push(probabilities[id]);
    for (const other of likeliest) {
      this.likeliest.push(other);
      this.odds.push(probabilities[other]);
    }
  }

  message() {
    return { ids: Int32Array.from(this.ids), probabilities: Float32Array.from(this.probabilities),
      likeliest: Int32Array.from(this.likeliest), odds: Float32Array.from(this.odds) };
  }
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text); // in browsers of 2025 and later
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

// The model of a page's elements: code and weights are lists of base64, the weights gzipped.
async function load({ layout, code, weights }) {
  const { instance } = await WebAssembly.instantiate(fromBase64(code.join("")), {});
  const memory = new Uint8Array(instance.exports.memory.buffer);
  const gunzip = new DecompressionStream("gzip"), reader = gunzip.readable.getReader();
  const written = writeAll(gunzip.writable.getWriter(), weights);
  for (let address = layout.first; ;) {
    const { done, value } = await reader.read();
    if (done) break;
    memory.set(value, address);
    address += value.length;
  }
  await written;
  return new Model(instance.exports, layout);
}

// Only one block at a time is in memory as bytes.
async function writeAll(writer, blocks) {
  for (const block of blocks) await writer.write(fromBase64(block));
  await writer.close();
}

// Lets messages that arrived be handled. A timer would wait for 4 ms.
const channel = new MessageChannel();
const pause = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(0);
});

let model, stopped;

async function write({ ids, options, again, end }, send) {
  stopped = false;
  let batch = new Batch(), sent = -Infinity; // the first token goes out at once
  for (const id of model.write(ids, options, again)) {
    batch.push(id, model);
    if (id === end) break;
    if (performance.now() - sent < PAUSE) continue;
    send({ batch: batch.message() });
    [batch, sent] = [new Batch(), performance.now()];
    await pause();
    if (stopped) break;
  }
  if (batch.ids.length) send({ batch: batch.message() });
}

const CALLS = {
  load: async (request) => { model = await load(request); },
  write,
  stop: () => { stopped = true; },
  predict: ({ ids, id }) => model.predict(ids, id),
  lookBack: ({ ids }) => model.lookBack(ids),
};

// A request {call, number, ...} is answered by {number, result}, or {number, error}; before that
// by any number of other messages with its number.
onmessage = async ({ data }) => {
  const send = (message) => postMessage({ number: data.number, ...message });
  try {
    send({ result: await CALLS[data.call](data, send) ?? null });
  } catch (error) {
    send({ error: String(error) });
  }
};
