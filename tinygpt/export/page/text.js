// The text as tokens that can be looked at one by one, and the list of alternatives of one of them.

const SIGNS = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d" };

const PART = 50; // tokens at least in a block of the text, but for the last

// How a token is written where its blanks have to be seen; bytes that are no text in hexadecimal.
function nameOf(id) {
  if (id === tokenizer.endOfText) return "end of text";
  const text = tokenizer.decode([id]);
  if (!text.includes("\ufffd")) return text.replace(/[ \n\t\r]/g, (blank) => SIGNS[blank]);
  const hex = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;
  return Array.from(tokenizer.bytes(id), hex).join("");
}

// The text of the page: a span for each of its tokens, {id, probability, alternatives}. Those of
// the prompt are {id, isPrompt}, and what the reader has chosen isChosen. onLook(index, how) is
// called when the reader points at one: by "hover", "focus", "choose" or "enter".
class Text {
  constructor(root, onLook) {
    Object.assign(this, { root, tokens: [], spans: [], decode: tokenizer.decoder() });
    const listen = (type, handle) => root.addEventListener(type, (event) => {
      const index = this.spans.indexOf(event.target.closest(".token"));
      if (index >= 0) handle(index, event);
    });
    listen("pointerover", (index, event) => {
      if (event.pointerType === "mouse") onLook(index, "hover");
    });
    listen("focusin", (index, event) => {
      if (event.target.matches(":focus-visible")) onLook(index, "focus");
    });
    listen("click", (index) => onLook(index, "choose"));
    listen("keydown", (index, event) => {
      const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0,
        End: this.spans.length - 1 }[event.key];
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
    for (const token of tokens) {
      const span = this.spanOf(token, this.decode(token.id));
      this.tokens.push(token);
      this.spans.push(span);
      this.part().append(span);
    }
  }

  spanOf(token, text) {
    const span = document.createElement("span"), isEnd = token.id === tokenizer.endOfText;
    const classes = { end: isEnd, break: text.startsWith("\n"), prompt: token.isPrompt,
      chosen: token.isChosen };
    span.className = ["token", ...Object.keys(classes).filter((name) => classes[name])].join(" ");
    span.dataset.id = token.id;
    span.tabIndex = this.spans.length ? -1 : 0;
    span.textContent = isEnd ? " end of text " : text;
    if (!token.isPrompt) span.style.setProperty("--surprise", surprise(token.probability));
    return span;
  }

  // The block that takes the next token. The browser lays out the last one only while the text
  // grows, and so a block ends at a line break once it is long.
  part() {
    const last = this.root.lastElementChild;
    const isFull = last?.childElementCount >= PART && last.lastChild.textContent.endsWith("\n");
    return last && !isFull ? last : this.root.appendChild(make("div", { class: "part" }));
  }

  // Keeps the first `length` tokens.
  cut(length) {
    for (const span of this.spans.splice(length)) span.remove();
    for (const part of this.root.querySelectorAll(".part:empty")) part.remove();
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

// How surprised the model is by a token of that probability: from 0, not at all, to 1, as by any
// token of which it knows nothing.
function surprise(probability) {
  const bits = -Math.log2(probability) / Math.log2(metadata.config.vocab_size);
  return Math.min(1, bits).toFixed(3);
}

// The list of what could stand in one place of the text. onChoose(index, id) is called when the
// reader chooses one.
class Popover {
  constructor(root, onChoose) {
    Object.assign(this, { root, onChoose, index: -1, isPinned: false });
    root.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const buttons = Array.from(root.querySelectorAll("button"));
      const at = buttons.indexOf(document.activeElement) + step;
      buttons[(at + buttons.length) % buttons.length]?.focus();
      event.preventDefault();
    });
  }

  // Shows the alternatives of a token of the text next to its span. A pinned list stays when the
  // pointer goes elsewhere.
  show(index, token, span, isPinned) {
    Object.assign(this, { index, isPinned });
    const { id, probability, alternatives = [] } = token;
    const rows = alternatives.some(([other]) => other === id) || probability === undefined
      ? alternatives : [...alternatives, [id, probability]];
    this.root.replaceChildren(
      make("p", { class: "title" }, make("b", {}, nameOf(id)),
        probability === undefined ? "" : make("span", {}, percent(probability))),
      make("ol", {}, ...rows.map(([other, p]) => make("li", {}, this.button(other, p, id)))),
      make("p", { class: "note" }, rows.length ? "Choose one to go on from there."
        : "The text begins here: nothing predicts this token."));
    this.root.hidden = false;
    this.place(span);
  }

  button(id, probability, idInText) {
    const bar = make("span", { class: "bar" }), isInText = id === idInText;
    bar.style.setProperty("--p", probability.toFixed(4));
    return make("button", { type: "button", "data-id": id, class: isInText ? "drawn" : "",
      "aria-label": `${nameOf(id)}, ${percent(probability)}${isInText ? ", in the text" : ""}`,
      onclick: () => this.onChoose(this.index, id) },
    bar, make("span", { class: "name" }, nameOf(id)),
    make("span", { class: "p" }, percent(probability)));
  }

  // Below the span, or above it where there is no room below.
  place(span) {
    const around = this.root.offsetParent.getBoundingClientRect();
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.root;
    const isAbove = at.bottom + height > innerHeight && at.top > height;
    const left = Math.min(at.left - around.left - 12, around.width - width);
    this.root.style.left = `${Math.max(0, left)}px`;
    this.root.style.top = `${(isAbove ? at.top - height : at.bottom) - around.top}px`;
  }

  hide() {
    this.root.hidden = true;
    Object.assign(this, { index: -1, isPinned: false });
  }
}
