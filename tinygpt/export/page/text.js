// The text as tokens that can be looked at one by one, and the list of alternatives of one of them.

const SIGNS = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d" };

// How a token is written where its blanks have to be seen; bytes that are no text in hexadecimal.
function nameOf(id) {
  if (id === tokenizer.endOfText) return "end of text";
  const text = tokenizer.decode([id]);
  if (!text.includes("\ufffd")) return text.replace(/[ \n\t\r]/g, (blank) => SIGNS[blank]);
  return Array.from(tokenizer.bytes(id), (b) => `\\x${b.toString(16).padStart(2, "0")}`).join("");
}

// The text of the page: a span for each of its tokens, {id, probability, alternatives}. Those of the
// prompt are {id, isPrompt}, and the one that the reader has chosen isChosen. onLook(index, how) is
// called when the reader points at one: by "hover", "focus", "choose" or "enter".
class Text {
  constructor(root, onLook) {
    Object.assign(this, { root, tokens: [], spans: [], decode: tokenizer.decoder() });
    const indexOf = (event) => this.spans.indexOf(event.target.closest(".token"));
    const listen = (type, handle) => root.addEventListener(type, (event) => {
      const index = indexOf(event);
      if (index >= 0) handle(index, event);
    });
    listen("pointerover", (index, event) => event.pointerType === "mouse" && onLook(index, "hover"));
    listen("focusin", (index, event) => event.target.matches(":focus-visible") && onLook(index, "focus"));
    listen("click", (index) => onLook(index, "choose"));
    listen("keydown", (index, event) => {
      const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: this.spans.length - 1 }[event.key];
      if (to !== undefined) this.focus(to);
      else if (["Enter", " ", "ArrowDown"].includes(event.key)) onLook(index, "enter");
      else return;
      event.preventDefault();
    });
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  append(tokens) {
    const added = document.createDocumentFragment();
    for (const token of tokens) {
      const text = this.decode(token.id), isEnd = token.id === tokenizer.endOfText;
      const span = make("span", { class: "token", tabindex: this.spans.length ? -1 : 0 }, text);
      if (isEnd) span.textContent = " end of text ";
      span.classList.toggle("end", isEnd);
      span.classList.toggle("break", text.startsWith("\n"));
      span.classList.toggle("prompt", Boolean(token.isPrompt));
      span.classList.toggle("chosen", Boolean(token.isChosen));
      if (!token.isPrompt) span.style.setProperty("--surprise", surprise(token.probability));
      this.tokens.push(token);
      this.spans.push(span);
      added.append(span);
    }
    this.root.append(added);
  }

  // Keeps the first `length` tokens.
  cut(length) {
    for (const span of this.spans.splice(length)) span.remove();
    this.tokens.length = length;
    this.decode = tokenizer.decoder();
    for (const token of this.tokens) this.decode(token.id);
  }

  replace(tokens) {
    this.cut(0);
    this.append(tokens);
  }

  // Makes the token the one that Tab goes to.
  focus(index) {
    const span = this.spans[index];
    if (!span) return;
    for (const other of this.root.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    span.tabIndex = 0;
    span.focus();
  }

  mark(index) {
    this.root.querySelector(".marked")?.classList.remove("marked");
    this.spans[index]?.classList.add("marked");
  }

  // Shades the tokens from `start` on by weights.
  shade(weights, start) {
    this.spans.forEach((span, i) => {
      const weight = weights[i - start] ?? 0;
      span.style.setProperty("--attention", weight < 0.001 ? 0 : Math.sqrt(weight).toFixed(3));
    });
  }
}

// How surprised the model is by a token of that probability: 0 not at all, 1 as by a guess among all.
function surprise(probability) {
  const bits = -Math.log2(probability) / Math.log2(metadata.config.vocab_size);
  return Math.min(1, bits).toFixed(3);
}

// The list of the likeliest tokens at one place of the text. `onChoose(index, id)` is called when
// the reader chooses one.
class Popover {
  constructor(root, onChoose) {
    Object.assign(this, { root, onChoose, index: -1, isPinned: false });
    root.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const buttons = Array.from(root.querySelectorAll("button"));
      buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length].focus();
      event.preventDefault();
    });
  }

  // Shows what could stand in place of a token, {id, probability, alternatives}, below its span.
  show(index, token, span, isPinned) {
    Object.assign(this, { index, isPinned });
    const { id, probability, alternatives = [] } = token;
    const isListed = alternatives.some(([other]) => other === id);
    const row = (other, p) => make("li", {}, this.button(index, other, p, other === id));
    this.root.replaceChildren(
      make("p", { class: "title" }, make("b", {}, nameOf(id)), ` ${probability === undefined ? "" : percent(probability)}`),
      make("ol", {}, ...alternatives.map(([other, p]) => row(other, p)),
        ...(isListed || probability === undefined ? [] : [row(id, probability)])),
      make("p", { class: "note" }, alternatives.length ? "Choose one, and the text goes on from there."
        : "The text begins with this token: nothing predicts it."));
    this.root.hidden = false;
    this.place(span);
  }

  button(index, id, p, isDrawn) {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--p", p.toFixed(4));
    return make("button", { type: "button", "data-id": id, class: isDrawn ? "drawn" : "", onclick: () => this.onChoose(index, id),
      "aria-label": `${nameOf(id)}, ${percent(p)}${isDrawn ? ", as in the text" : ""}` },
      bar, make("span", { class: "name" }, nameOf(id)), make("span", { class: "p" }, percent(p)));
  }

  place(span) {
    const around = this.root.offsetParent.getBoundingClientRect();
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const room = around.width - this.root.offsetWidth;
    this.root.style.left = `${Math.max(0, Math.min(at.left - around.left - 12, room))}px`;
    this.root.style.top = `${at.bottom - around.top + 1}px`;
  }

  hide() {
    this.root.hidden = true;
    Object.assign(this, { index: -1, isPinned: false });
  }
}
