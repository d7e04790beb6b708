// A conversation with the model of a server, by its /v1/chat/completions.

// The messages and their elements. Where they outgrow the model's context, the oldest turns are
// forgotten: the model is sent those from `forgotten` on, and the system message.
class Conversation {
  constructor(root) {
    Object.assign(this, { root, messages: [], forgotten: 0, controller: undefined });
    this.line = make("p", { id: "forgotten" }, "The model no longer sees what is above.");
  }

  // Adds a message of the reader and its answer while that is written. Its promise is rejected
  // with an Error for the reader, and both are removed, where the server does not answer.
  async say(content) {
    const user = this.show("user", content), answer = this.show("assistant", "");
    this.messages.push({ role: "user", content });
    answer.setAttribute("aria-busy", "true");
    this.controller = new AbortController();
    const { signal } = this.controller;
    const text = answer.firstChild;
    let finish = "stopped";
    try {
      for await (const piece of this.pieces(signal)) {
        finish = piece.finish_reason ?? finish;
        text.appendData(piece.delta.content ?? "");
        this.follow(answer);
      }
    } catch (error) {
      if (!signal.aborted) {
        this.messages.pop();
        user.remove();
        answer.remove();
        throw new Error(`The server does not answer: ${error.message}`);
      }
    } finally {
      this.controller = undefined;
      answer.removeAttribute("aria-busy");
    }
    this.messages.push({ role: "assistant", content: text.data });
    const note = { length: "Cut off at the maximum length.", stopped: "Stopped." };
    if (finish in note) answer.append(make("span", { class: "note" }, note[finish]));
    this.follow(answer);
  }

  // The pieces of the answer, {delta, finish_reason}. It has room for half of the context at most;
  // where even a quarter is not left, turns are forgotten.
  async *pieces(signal) {
    for (let share = 1 / 2; ;) {
      const response = await fetch("v1/chat/completions", { method: "POST", signal,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(this.request(share)) });
      if (response.ok) {
        for await (const event of eventsOf(response.body)) {
          if (event.error) throw new Error(event.error.message);
          yield event.choices[0];
        }
        return;
      }
      const { error } = await response.json();
      if (error.code !== "context_length_exceeded") throw new Error(error.message);
      if (share === 1 / 4 && !this.forget()) throw new Error(error.message);
      share = share === 1 / 2 ? 1 / 4 : 1 / 2;
    }
  }

  request(share) {
    const { max_new_tokens, seed, window_hop, ...sampling } = options();
    const system = $("system").value.trim();
    return { ...sampling, model: metadata.name, stream: true,
      max_tokens: Math.max(1, Math.min(max_new_tokens, Math.floor(share * config.block_size))),
      messages: [...(system ? [{ role: "system", content: system }] : []),
        ...this.messages.slice(this.forgotten)] };
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

const conversation = new Conversation($("messages"));

function showTalk(line = "", isError = false) {
  const isBusy = Boolean(conversation.controller);
  $("send").hidden = isBusy;
  $("hush").hidden = !isBusy;
  $("reset").hidden = isBusy || !conversation.messages.length;
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
const first = location.hash || (metadata.has_template ? "#conversation" : "#text");
if (first === "#conversation" || !knowsText) {
  document.querySelector("input[name=mode][value=conversation]").checked = true;
}
showMode();
