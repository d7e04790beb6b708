// Text to token ids and back, as tinygpt/data/tokenizer.py does it: byte-level BPE, characters, or
// bytes. A token is written here as a string with one character, "\x00" to "\xff", for each byte.

const toBytes = (text) =>
  Array.from(new TextEncoder().encode(text), (b) => String.fromCharCode(b)).join("");
const isHalf = /\p{Surrogate}/u; // with the flag u only half of a pair matches

class Tokenizer {
  // data: what to_json() of the Python class returns, and for bpe also the classes of characters
  // {letters, numbers} that tiktoken knows, which may be newer or older than the browser's.
  constructor(data) {
    this.kind = data.kind;
    if (data.kind === "char") {
      this.tokens = Array.from(data.chars, toBytes);
    } else if (data.kind === "byte") {
      this.tokens = Array.from({ length: 256 }, (_, b) => String.fromCharCode(b));
    } else if (data.kind === "hf") {
      this.tokens = []; // the server alone has them
    } else {
      this.tokens = data.tokens.map(atob);
      this.endOfText = this.tokens.length;
      const [L, N, S] = [data.letters, data.numbers, "\\p{White_Space}"];
      this.pattern = new RegExp(`'(?:[sdmt]|ll|ve|re)| ?[${L}]+| ?[${N}]+| ?[^${S}${L}${N}]+` +
        `|${S}+(?!\\P{White_Space})|${S}+`, "gu");
    }
    this.ids = new Map(this.tokens.map((token, id) => [token, id]));
  }

  // The ids of a text. Throws an Error, with a line for the reader, where it has none.
  encode(text) {
    const half = text.match(isHalf);
    if (half) {
      throw new Error(`The character at ${half.index} is half of a surrogate pair: remove it.`);
    }
    if (this.kind === "byte") return Array.from(new TextEncoder().encode(text));
    if (this.kind === "bpe") {
      return (text.match(this.pattern) ?? []).flatMap((word) => this.merge(toBytes(word)));
    }
    const chars = Array.from(text), ids = chars.map((c) => this.ids.get(toBytes(c)));
    const missing = [...new Set(chars.filter((_, i) => ids[i] === undefined))];
    if (missing.length) {
      throw new Error("The model knows only the characters of its training text; it lacks " +
        missing.slice(0, 10).map((c) => JSON.stringify(c)).join(", ") + ".");
    }
    return ids;
  }

  // The ids of one word: the two neighbors that together have the lowest id are joined, again and
  // again.
  merge(word) {
    if (this.ids.has(word)) return [this.ids.get(word)];
    const parts = Array.from(word);
    const rank = (i) => i + 1 === parts.length ? Infinity
      : this.ids.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.map((_, i) => rank(i)); // of each part joined with the next
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (ranks[best] === Infinity) return parts.map((part) => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best + 1, 1);
      ranks[best] = rank(best);
      if (best > 0) ranks[best - 1] = rank(best - 1);
    }
  }

  // The bytes of an id; end-of-text has none.
  bytes(id) {
    return Uint8Array.from(this.tokens[id] ?? "", (c) => c.charCodeAt(0));
  }

  // A function that takes ids one at a time and returns the characters complete with each;
  // without an id it returns what is left, U+FFFD for an incomplete character.
  decoder() {
    const utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id) => id === undefined ? utf8.decode() : utf8.decode(this.bytes(id), { stream: true });
  }

  decode(ids) {
    const next = this.decoder();
    return ids.map((id) => next(id)).join("") + next();
  }
}
