// What the page tells of its model: its sizes, its training, and how it makes a token.

function describeModel() {
  const { parameters, training, precision } = metadata;
  $("summary").textContent = `This one has ${count(parameters)} parameters` +
    (training?.data ? ` and learned from ${count(training.data.training_tokens)} tokens of ` +
      `${fileName(training.data.source)}` : "") +
    (isOwn ? ". It runs here, in your browser: nothing is sent anywhere." : ". It runs on the server of this page.");
  const rows = [
    ["Parameters", count(parameters)],
    ["Numbers kept as", precision],
    ["Layers", config.n_layer],
    ["Attention heads in each", config.n_head],
    ["Numbers for a token", config.n_embd],
    ["Context", `${count(config.block_size)} tokens`],
    ["Vocabulary", `${count(config.vocab_size)} tokens (${metadata.tokenizer.kind})`],
  ];
  if (training?.data) {
    const { source, training_tokens } = training.data;
    rows.push(["Training text", `${fileName(source)}, ${count(training_tokens)} tokens`]);
  }
  if (training) rows.push(["Training steps", count(training.step)]);
  const last = training?.evaluations.at(-1);
  if (last) rows.push(["Validation loss", `${last[2].toFixed(2)} nats per token`]);
  if (training?.bits_per_byte) rows.push(["", `${training.bits_per_byte.toFixed(2)} bits per byte`]);
  $("sizes").append(...rows.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  if (training && training.loss.length + training.evaluations.length > 1) showCurve(training);
  describeSteps();
}

const fileName = (path) => path.split("/").at(-1);

function showCurve(training) {
  const chance = Math.log(config.vocab_size);
  $("curve").append(lossCurve(training, chance), make("figcaption", {},
    "Its loss while it learned, in nats per token: of the training batches (thin) and of text that " +
    `it was not trained on (strong). Dotted: a guess among all ${count(config.vocab_size)} tokens, ` +
    `ln ${count(config.vocab_size)} = ${chance.toFixed(2)}.`));
  $("curve").hidden = false;
}

function describeSteps() {
  const { n_layer, n_head, n_embd, block_size, vocab_size } = config;
  const steps = [
    ["The text is cut into tokens.", `This model knows ${count(vocab_size)} of them. Your prompt is:`],
    ["Each token becomes numbers.", `A token is ${count(n_embd)} numbers. In each of ${n_layer} layers, ` +
      `${n_head} attention heads gather what they need from the last ${count(block_size)} tokens, and ` +
      "then every position is computed by itself."],
    ["Every token gets a probability.", "The last position says how likely each of the " +
      `${count(vocab_size)} tokens is to come next.`],
    ["One is drawn.", "Chance decides, in proportion to the probabilities after the sampling " +
      "parameters have changed them. The text is one token longer, and everything begins again."],
  ];
  $("steps").append(...steps.map(([title, line], i) =>
    make("li", {}, make("b", {}, title), " ", line, i ? "" : make("p", { id: "words" }))));
}

// The first tokens of the prompt with their ids.
function showWords(ids) {
  const MOST = 12;
  $("words").replaceChildren(...ids.slice(0, MOST).map((id) =>
    make("span", { class: "word" }, nameOf(id), make("small", {}, String(id)))),
    ids.length > MOST ? ` and ${count(ids.length - MOST)} more` : "");
}
