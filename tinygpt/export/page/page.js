// The page itself: its settings, its buttons, and what is shown of the model.

const metadata = JSON.parse(document.getElementById("metadata").textContent);
const tokenizer = new Tokenizer(metadata.tokenizer);
const isOwn = document.getElementById("worker") !== null; // the model is in this page
const backend = isOwn ? new BrowserModel(tokenizer.endOfText) : new ServerModel(metadata);
const { config } = metadata;
const $ = (id) => document.getElementById(id);

// ---- sampling

const SETTINGS = [ // `off` is the value at which a parameter does nothing
  { name: "temperature", label: "Temperature", low: 0, high: 2, step: 0.05,
    note: "below 1 plainer, above 1 wilder, 0 always the likeliest token" },
  { name: "top_k", label: "Top-k", low: 0, high: Math.min(config.vocab_size, 100), step: 1,
    off: 0, note: "draws among the k likeliest" },
  { name: "top_p", label: "Top-p", low: 0.05, high: 1, step: 0.01, off: 1,
    note: "draws among the likeliest that together have probability p" },
  { name: "min_p", label: "Min-p", low: 0, high: 1, step: 0.01, off: 0,
    note: "draws among those at least p times as likely as the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", low: 1, high: 2, step: 0.01, off: 1,
    note: "above 1 makes tokens less likely that were used before" },
  { name: "window_hop", label: "Window hop", low: 1, high: Math.ceil(config.block_size / 2),
    step: 1, note: "tokens by which the context moves when the text outgrows it; unless given, " +
      "half of the context" },
  { name: "max_new_tokens", label: "Tokens", low: 10, high: 1000, step: 10,
    note: "how many to write" },
  { name: "seed", label: "Seed", low: 0, high: 2 ** 32 - 1, step: 1, isNumber: true,
    note: "the same seed gives the same text" },
];

function makeSettings() {
  for (const { name, label, low, high, step, note, off, isNumber } of SETTINGS) {
    const input = make("input", { id: name, type: isNumber ? "number" : "range", min: low,
      max: high, step, value: metadata.sample[name] ?? off ?? high, oninput: showSettings,
      "aria-describedby": `${name}-note` });
    $("settings").append(make("div", { class: "setting" }, make("label", { for: name }, label),
      isNumber ? "" : make("output", { id: `${name}-value`, for: name }), input,
      make("p", { class: "note", id: `${name}-note` }, note)));
  }
  showSettings();
}

// The value of each setting, and in the closed list those that matter.
function showSettings() {
  const changed = [];
  for (const { name, off, isNumber } of SETTINGS) {
    const value = Number($(name).value);
    if (!isNumber) $(`${name}-value`).textContent = value === off ? "off" : String(value);
    const isOn = off === undefined ? ["temperature", "seed"].includes(name) : value !== off;
    if (isOn) changed.push(`${name.replaceAll("_", " ")} ${value}`);
  }
  $("sampled").textContent = changed.join(", ");
}

// The values of the settings, by their names in SampleConfig; null where one is off.
function options() {
  return Object.fromEntries(SETTINGS.map(({ name, off, low, high }) => {
    const value = Math.min(high, Math.max(low, Number($(name).value) || 0));
    return [name, name.startsWith("top") && value === off ? null : value];
  }));
}

// ---- writing

const text = new Text($("text"), look);
const popover = new Popover($("popover"), branch);
const earlier = []; // the texts before this one, for Undo
let writing; // {stop: AbortController, done: promise} while the model writes

function say(line, isError = false) {
  $("status").textContent = line;
  $("status").classList.toggle("error", isError);
}

function showButtons() {
  const last = text.tokens.at(-1)?.id;
  $("stop").hidden = !writing;
  $("continue").hidden = Boolean(writing);
  $("continue").disabled = last === undefined || last === tokenizer.endOfText;
  $("back").hidden = !earlier.length;
}

async function stop() {
  while (writing) { // another call may have begun to write meanwhile
    writing.stop.abort();
    await writing.done;
  }
}

// Lets the model continue the text, from the beginning or where it stopped.
function write(isNew) {
  const controller = new AbortController();
  writing = { stop: controller, done: run(isNew, controller.signal) };
  showButtons();
  return writing.done;
}

async function run(isNew, signal) {
  const clock = { start: performance.now(), first: 0, last: 0, tokens: 0 };
  say("Writing");
  try {
    await backend.write(text.ids, options(), isNew, (tokens) => {
      if (signal.aborted) return;
      clock.last = performance.now();
      if (!clock.first) performance.mark("first token"); // for bench/page.py
      clock.first ||= clock.last;
      clock.tokens += tokens.length;
      text.append(tokens);
    }, signal);
    if (clock.first) performance.measure("writing", { start: clock.start, end: clock.last });
    say(speed(clock));
  } catch (error) {
    say(error.message, true);
  }
  writing = undefined;
  showButtons();
}

function speed({ start, first, last, tokens }) {
  const rate = (tokens - 1) / (last - first) * 1000;
  const known = Number.isFinite(rate) && rate > 0;
  return `${count(tokens)} tokens` + (known ? `, ${count(Number(rate.toPrecision(3)))} tokens/s, ` +
    `the first after ${count(Math.round(first - start))} ms` : "");
}

// Replaces the text by tokens and lets the model go on from there.
async function writeAfter(tokens, isNew) {
  await stop();
  if (text.tokens.length) earlier.push(text.tokens.slice());
  text.replace(tokens);
  popover.hide();
  pictured = undefined;
  await write(isNew);
}

// Begins a new text with the prompt. An empty one is a line break, as for generate.py.
async function start() {
  const prompt = $("prompt").value || "\n";
  let ids;
  try {
    ids = tokenizer.encode(prompt);
  } catch (error) {
    if (prompt !== "\n") return say(error.message, true);
    ids = [0];
  }
  showWords(ids);
  await writeAfter(ids.map((id) => ({ id, isPrompt: true })), true);
}

// Puts another token in the place of one, and goes on from there.
async function branch(index, id) {
  const { id: former, probability, alternatives } = text.tokens[index];
  const chosen = { id, alternatives, isChosen: true, probability: id === former ? probability
    : alternatives.find(([other]) => other === id)[1] };
  const done = writeAfter([...text.tokens.slice(0, index), chosen], false);
  await Promise.resolve(); // once the token has its place
  text.focus(index);
  await done;
}

async function undo() {
  await stop();
  text.replace(earlier.pop());
  popover.hide();
  pictured = undefined;
  say("");
  showButtons();
}

// ---- looking at a token

const view = () => document.querySelector("input[name=view]:checked").value;
let looked = -1; // the token whose attention is shown

async function look(index, how) {
  if (how === "hover" && popover.isPinned) return;
  text.mark(index);
  if (view() === "attention") await showAttention(index);
  const isAsked = how === "choose" || how === "enter";
  if (view() === "probability" || isAsked) await showAlternatives(index, how, isAsked);
}

let asked = 0; // how often alternatives were asked for: the last ones are shown

async function showAlternatives(index, how, isPinned) {
  const token = text.tokens[index], turn = ++asked;
  if (token.isPrompt && index > 0 && backend.predict) {
    Object.assign(token, await backend.predict(text.ids.slice(0, index), token.id));
  }
  if (turn !== asked || token !== text.tokens[index]) return; // the text may have changed too
  popover.show(index, token, text.spans[index], isPinned);
  if (how === "enter") popover.root.querySelector("button")?.focus();
}

let pictured; // the attention that is shown: {index, heads, start}
let isLooking = false;

async function showAttention(index) {
  looked = index;
  if (isLooking) return; // the call in progress looks again at its end
  isLooking = true;
  while (looked >= 0 && pictured?.index !== looked) {
    const at = looked;
    pictured = { index: at, ...await backend.lookBack(text.ids.slice(0, at + 1)) };
  }
  isLooking = false;
  shadeByHead();
}

// ---- attention

const heads = []; // {layer, head, canvas}; the first is the mean of all

function makeHeads() {
  const choice = (layer, head, name) => {
    const canvas = make("canvas", { width: 64, height: 24 });
    heads.push({ layer, head, canvas });
    const input = make("input", { type: "radio", name: "head", value: heads.length - 1,
      "aria-label": name, onchange: shadeByHead });
    input.checked = layer === undefined;
    return make("label", { title: name }, input, canvas);
  };
  const mean = choice(undefined, undefined, "the mean of all heads");
  const rows = Array.from({ length: config.n_layer }, (_, layer) =>
    Array.from({ length: config.n_head }, (_, head) =>
      choice(layer, head, `layer ${layer + 1}, head ${head + 1}`)));
  const layers = make("div", { class: "layers" }, ...rows.flat());
  layers.style.setProperty("--heads", config.n_head);
  $("heads").append(make("div", {},
    make("div", { class: "mean" }, mean, "mean of all heads"), layers,
    make("p", { class: "note" }, "A row for each layer, a column for each head.")));
}

function weightsOf({ layer, head }) {
  if (layer !== undefined) return pictured.heads[layer][head];
  const all = pictured.heads.flat();
  return all[0].map((_, i) => all.reduce((sum, weights) => sum + weights[i], 0) / all.length);
}

function shadeByHead() {
  if (!pictured) return;
  for (const each of heads) drawHead(each.canvas, weightsOf(each));
  const chosen = heads[Number(document.querySelector("input[name=head]:checked").value)];
  text.shade(weightsOf(chosen), pictured.start);
  text.mark(pictured.index);
}

// What the shades mean, by view: the two ends of a scale, and what the reader can do.
const LEGENDS = {
  probability: ["expected", "surprising", "Shaded by how unlikely the model found each token. " +
    "Point at one, or tap it, to see what it could have written instead."],
  attention: ["ignored", "attended to", "Point at a token, or tap it, to see which earlier " +
    "tokens the model attends to after reading it, in one of its heads or in all."],
  plain: ["", "", "Tap a token to see what could stand in its place."],
};

function showView() {
  const [low, high, line] = LEGENDS[view()];
  $("reading").dataset.view = view();
  $("legend").replaceChildren(...(low ? [make("span", { class: "scale" }, low, make("i"), high)]
    : []), line);
  $("heads").hidden = view() !== "attention";
  popover.hide();
  if (view() === "attention" && text.tokens.length) showAttention(text.tokens.length - 1);
}

// ---- start

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) start();
  });
  $("continue").addEventListener("click", () => write(false));
  $("stop").addEventListener("click", stop);
  $("back").addEventListener("click", undo);
  $("views").addEventListener("change", showView);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (popover.root.hidden) return stop();
    const { index } = popover;
    if (popover.root.contains(document.activeElement)) text.focus(index);
    popover.hide();
  });
  // the list goes away when the pointer leaves it and the text, or presses elsewhere
  $("reading").addEventListener("pointerleave", () => popover.isPinned || popover.hide());
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#popover, .token")) popover.hide();
  });
}

$("prompt").value = metadata.prompt === "\n" ? "" : metadata.prompt;
makeSettings();
describeModel();
if (backend.lookBack) makeHeads();
else $("attention-view").remove();
showView();
listen();
try {
  await backend.ready;
  $("write").disabled = false;
  say("");
  if (isOwn && !metadata.chat) await start();
} catch (error) {
  say(error.message, true);
}
