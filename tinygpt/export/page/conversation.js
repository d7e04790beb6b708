// A conversation with the model. What answers has
//   answer(messages, options, onText, signal): calls onText with pieces of the answer to messages.
//     Its promise is fulfilled with why the answer ended, "stop" or "length", or, where the signal
//     was aborted, with undefined. It is rejected with an Error for the reader, whose code is
//     "context_length_exceeded" where messages and answer do not fit into the model's context.

// The model of a server, by its /v1/chat/completions.
class ServerChat {
  async answer(messages, { max_new_tokens, seed, window_hop, ...sampling }, onText, signal) {
    let finish;
    try {
      const response = await fetch("v1/chat/completions", { method: "POST", signal,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...sampling, model: metadata.name, stream: true,
          max_tokens: max_new_tokens, messages }) });
      if (!response.ok) throw (await response.json()).error;
      for await (const event of eventsOf(response.body)) {
        if (event.error) throw event.error;
        const [{ delta, finish_reason }] = event.choices;
        finish = finish_reason ?? finish;
        onText(delta.content ?? "");
      }
    } catch ({ message, code }) {
      if (!signal.aborted) {
        throw Object.assign(new Error(`The server does not answer: ${message}`), { code });
      }
    }
    return finish;
  }
}

// The model in this page, with messages in the plain format of tinygpt/data/chat.py.
class PageChat {
  // begin: the ids that every text begins with. end: the id that ends an answer; null for a line
  // break, which ends all other messages.
  constructor({ begin, end }) {
    Object.assign(this, { begin, end });
    this.lineBreak = tokenizer.encode("\n");
    this.stop = end ?? this.lineBreak.at(-1);
  }

  // The ids of messages, and of what an answer begins with.
  encode(messages) {
    const header = (role) => tokenizer.encode(`${role[0].toUpperCase()}${role.slice(1)}:\n`);
    const ending = (role) => role === "assistant" && this.end !== null ? [this.end]
      : this.lineBreak;
    return [...this.begin, ...messages.flatMap(({ role, content }) =>
      [...header(role), ...tokenizer.encode(content), ...ending(role)]), ...header("assistant")];
  }

  async answer(messages, options, onText, signal) {
    await backend.ready;
    await stop(); // of the text, which the same model writes
    const ids = this.encode(messages), next = tokenizer.decoder();
    if (ids.length + options.max_new_tokens > config.block_size) {
      throw Object.assign(new Error(`The messages have ${count(ids.length)} tokens, and do not ` +
        `fit into the model's context of ${count(config.block_size)}: send a shorter one.`),
        { code: "context_length_exceeded" });
    }
    const seed = crypto.getRandomValues(new Uint32Array(1))[0];
    let last;
    await backend.write(ids, { ...options, seed }, false, (tokens) => {
      last = tokens.at(-1).id;
      onText(tokens.filter(({ id }) => id !== this.stop).map(({ id }) => next(id)).join(""));
    }, signal, this.stop);
    return last === this.stop ? "stop" : signal.aborted ? undefined : "length";
  }
}

// The messages and their elements. Where they outgrow the model's context, the oldest turns are
// forgotten: the model is sent those from `forgotten` on, and the system message.
class Conversation {
  constructor(root, model) {
    Object.assign(this, { root, model, messages: [], forgotten: 0, controller: undefined });
    this.line = make("p", { id: "forgotten" }, "The model no longer sees what is above.");
  }

  // Adds a message of the reader and its answer while that is written. Where there is no answer,
  // its promise is rejected with an Error for the reader, and both are removed.
  async say(content) {
    const user = this.show("user", content), answer = this.show("assistant", "");
    this.messages.push({ role: "user", content });
    answer.setAttribute("aria-busy", "true");
    this.controller = new AbortController();
    const { signal } = this.controller;
    const text = answer.firstChild;
    let finish;
    try {
      finish = await this.ask((piece) => {
        text.appendData(piece);
        this.follow(answer);
      }, signal);
    } catch (error) {
      this.messages.pop();
      user.remove();
      answer.remove();
      throw error;
    } finally {
      this.controller = undefined;
      answer.removeAttribute("aria-busy");
    }
    this.messages.push({ role: "assistant", content: text.data });
    const note = { length: "Cut off at the maximum length.", undefined: "Stopped." };
    if (finish in note) answer.append(make("span", { class: "note" }, note[finish]));
    this.follow(answer);
  }

  // Asks for an answer. It has room for half of the context at most; where even a quarter is not
  // left, turns are forgotten.
  async ask(onText, signal) {
    for (let share = 1 / 2; ;) {
      const { max_new_tokens, ...sampling } = options();
      const room = Math.max(1, Math.min(max_new_tokens, Math.floor(share * config.block_size)));
      try {
        return await this.model.answer(this.remembered(), { ...sampling, max_new_tokens: room },
          onText, signal);
      } catch (error) {
        if (error.code !== "context_length_exceeded") throw error;
        if (share === 1 / 4 && !this.forget()) throw error;
      }
      share = share === 1 / 2 ? 1 / 4 : 1 / 2;
    }
  }

  // What the model is sent.
  remembered() {
    const system = $("system").value.trim();
    return [...(system ? [{ role: "system", content: system }] : []),
      ...this.messages.slice(this.forgotten)];
  }

  show(role, content) {
    const element = make("div", { class: `message ${role}`,
      "aria-label": role === "user" ? "You" : "The model" }, document.createTextNode(content));
    this.root.append(element);
    element.scrollIntoView({ block: "nearest" });
    return element;
  }

  // Keeps the end of an answer in view, unless the reader has scrolled away.
  follow(answer) {
    const { bottom } = answer.getBoundingClientRect();
    if (bottom < innerHeight + 100) answer.scrollIntoView({ block: "nearest" });
  }

  // The oldest turn, a message and its answer. Returns false where only the last message is left.
  forget() {
    if (this.forgotten + 2 >= this.messages.length) return false;
    this.forgotten += 2;
    const elements = this.root.querySelectorAll(".message");
    for (const element of [...elements].slice(0, this.forgotten)) element.classList.add("forgotten");
    elements[this.forgotten].before(this.line);
    return true;
  }

  stop() {
    this.controller?.abort();
  }

  reset() {
    this.messages = [];
    this.forgotten = 0;
    this.root.replaceChildren();
  }
}

const conversation = new Conversation($("messages"),
  isOwn ? new PageChat(metadata.chat) : new ServerChat());

function showTalk(line = "", isError = false) {
  const isBusy = Boolean(conversation.controller);
  $("send").hidden = isBusy;
  $("hush").hidden = !isBusy;
  $("reset").hidden = isBusy || !conversation.messages.length;
  $("modes").disabled = isBusy && isOwn; // one model writes both
  $("talk-status").textContent = line;
  $("talk-status").classList.toggle("error", isError);
}

async function sendMessage() {
  const content = $("message").value.trim();
  if (!content || conversation.controller) return;
  $("message").value = "";
  const done = conversation.say(content);
  showTalk("Writing");
  try {
    await done;
    showTalk();
  } catch (error) {
    $("message").value ||= content;
    showTalk(error.message, true);
  }
}

// Shows the conversation or the text, each with the settings of sampling.
function showMode() {
  const isTalk = document.querySelector("input[name=mode]:checked").value === "conversation";
  $("conversation").hidden = !isTalk;
  $("form").hidden = $("reading").hidden = isTalk;
  $(isTalk ? "talk-settings" : "form").append($("sampling"));
  history.replaceState(null, "", isTalk ? "#conversation" : "#text");
  if (isTalk) $("message").focus({ preventScroll: true });
}

$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  sendMessage();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  sendMessage();
});
$("hush").addEventListener("click", () => conversation.stop());
$("reset").addEventListener("click", () => {
  conversation.reset();
  showTalk();
  $("message").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") conversation.stop();
});
$("modes").addEventListener("change", showMode);

const knowsText = metadata.tokenizer.kind !== "hf"; // which is encoded by the server alone
$("modes").hidden = !knowsText;
const isMadeForIt = metadata.has_template || Boolean(metadata.chat);
const first = location.hash || (isMadeForIt ? "#conversation" : "#text");
$("system").value = metadata.chat?.system ?? "";
if (first === "#conversation" || !knowsText) {
  document.querySelector("input[name=mode][value=conversation]").checked = true;
}
showMode();
