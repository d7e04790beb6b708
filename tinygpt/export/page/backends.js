// What writes the text: the model in this page, or that of the server that the page came from. Both
// have
//   ready: a promise that is fulfilled when the model can write
//   write(ids, options, again, onTokens, signal, end): continues ids and calls onTokens with lists of
//     {id, probability, alternatives: [[id, probability], ...]}. Its promise is fulfilled at the
//     end, or soon after the signal is aborted. With `again` a new text begins with ids. The model
//     in this page ends after the id `end`, end-of-text unless given.
// and, where the model is in this page,
//   predict(ids, id): a promise of {id, probability, alternatives} of id after ids
//   lookBack(ids): a promise of how much the last of ids attends to those before it,
//     {heads: [[weights, ...] of each head, ...] of each layer, start}: weights begin at ids[start]
// Their promises are rejected with an Error whose message is for the reader.

class BrowserModel {
  constructor(endOfText) {
    this.endOfText = endOfText;
    this.waiting = new Map(); // what takes the messages of each unfinished call
    this.calls = 0;
    const source = document.getElementById("worker").textContent;
    this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    this.worker.onmessage = ({ data }) => this.waiting.get(data.number)(data);
    this.ready = this.load();
  }

  async load() {
    const elements = (name) => Array.from(document.querySelectorAll(`script.${name}`));
    const texts = (name) => elements(name).map((element) => element.textContent);
    const layout = JSON.parse(document.getElementById("layout").textContent);
    try {
      await this.call("load", { layout, code: texts("code"), weights: texts("weights") });
    } catch (error) {
      throw new Error("The model cannot run here: it needs a browser of 2023 or later, with " +
        `WebAssembly, and ${Math.ceil(layout.pages / 16)} MB of memory (${error.message}).`);
    }
    for (const element of elements("weights")) element.remove(); // frees their memory
  }

  call(name, request, onMessage) {
    const number = this.calls++;
    return new Promise((resolve, reject) => {
      this.waiting.set(number, (message) => {
        if (!("result" in message || "error" in message)) return onMessage(message);
        this.waiting.delete(number);
        return "error" in message ? reject(new Error(message.error)) : resolve(message.result);
      });
      this.worker.postMessage({ call: name, number, ...request });
    });
  }

  async write(ids, options, again, onTokens, signal, end = this.endOfText) {
    const stop = () => this.call("stop");
    signal.addEventListener("abort", stop);
    await this.call("write", { ids, options, again, end },
      ({ batch }) => onTokens(tokensOfBatch(batch)));
    signal.removeEventListener("abort", stop);
  }

  async predict(ids, id) {
    const [token] = tokensOfBatch(await this.call("predict", { ids, id }));
    return token;
  }

  lookBack(ids) {
    return this.call("lookBack", { ids });
  }
}

// The tokens of a batch of the worker.
function tokensOfBatch({ ids, probabilities, likeliest, odds }) {
  const listed = likeliest.length / ids.length;
  return Array.from(ids, (id, i) => {
    const places = Array.from({ length: listed }, (_, rank) => i * listed + rank);
    return { id, probability: probabilities[i],
      alternatives: places.map((place) => [likeliest[place], odds[place]]) };
  });
}

class ServerModel {
  constructor(metadata) {
    this.name = metadata.name;
    this.ready = Promise.resolve();
  }

  async write(ids, options, again, onTokens, signal) {
    const { max_new_tokens, ...sampling } = options;
    const body = { ...sampling, model: this.name, prompt: ids, max_tokens: max_new_tokens,
      stream: true, logprobs: 10, return_tokens_as_token_ids: true };
    try {
      const response = await fetch("v1/completions", { method: "POST", signal,
        headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const event of eventsOf(response.body)) onTokens(tokensOf(event));
    } catch (error) {
      if (!signal.aborted) throw new Error(`The server does not answer: ${error.message}`);
    }
  }
}

// The JSON of each server-sent event up to [DONE].
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + value).split(/\r?\n\r?\n/);
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      if (!data.startsWith(":")) yield JSON.parse(data); // and not a comment
    }
  }
}

// The tokens of an event of /v1/completions, in which they are called "token_id:7".
function tokensOf(event) {
  if (event.error) throw new Error(event.error.message);
  const id = (name) => Number(name.replace("token_id:", ""));
  const { tokens, token_logprobs, top_logprobs } = event.choices[0].logprobs ?? { tokens: [] };
  return tokens.map((name, i) => ({
    id: id(name),
    probability: Math.exp(token_logprobs[i]),
    alternatives: Object.entries(top_logprobs[i] ?? {})
      .map(([other, logprob]) => [id(other), Math.exp(logprob)]).sort((a, b) => b[1] - a[1]),
  }));
}
