// What the page says about its model: its sizes, its training, and how it makes a token.

const fileName = (path) => path.split("/").at(-1);

function describeModel() {
  const { parameters, training } = metadata;
  const learned = training?.data ? ` and learned from ${count(training.data.training_tokens)} ` +
    `tokens of ${fileName(training.data.source)}` : "";
  $("summary").textContent = `This one has ${count(parameters)} parameters${learned}. ` +
    (isOwn ? "It runs here, in your browser. Nothing is sent anywhere."
      : "It runs on the server that this page came from.");
  $("sizes").append(...rowsOf(metadata).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  if (training?.evaluations.length > 1) showCurve(training);
  $("footer").hidden = !isOwn;
  describeSteps();
}

// The table of sizes: [name, value].
function rowsOf({ parameters, precision, training }) {
  const rows = [["Parameters", count(parameters)], ["Precision", precision],
    ["Layers", config.n_layer], ["Attention heads", `${config.n_head} in each layer`],
    ["Embedding size", config.n_embd], ["Context", `${count(config.block_size)} tokens`],
    ["Vocabulary", `${count(config.vocab_size)} tokens`], ["Tokenizer", metadata.tokenizer.kind]];
  if (training?.data) {
    rows.push(["Training text", fileName(training.data.source)],
      ["Size of the text", `${count(training.data.training_tokens)} tokens`]);
  }
  if (training) rows.push(["Training", `${count(training.step)} steps`]);
  const validation = training?.evaluations.at(-1)?.[2].toFixed(2);
  if (validation) rows.push(["Validation loss", `${validation} nats per token`]);
  if (training?.bits_per_byte) {
    rows.push(["Loss per byte", `${training.bits_per_byte.toFixed(2)} bits per byte`]);
  }
  return rows;
}

function showCurve(training) {
  const chance = Math.log(config.vocab_size), key = (name) => make("i", { class: name });
  $("curve").append(lossCurve(training, chance), make("figcaption", {},
    "The loss over the training steps, in nats per token: of ", key("batches"), "the batches, ",
    key("training"), "the training text and ", key("validation"), "the validation text, which the ",
    `model was not trained on. Dotted: a guess among all tokens, ln ${config.vocab_size} = `,
    `${chance.toFixed(2)}.`));
  $("curve").hidden = false;
}

function describeSteps() {
  const { n_layer, n_head, n_embd, block_size, vocab_size } = config;
  const steps = [
    ["The text is split into tokens.", `The model knows ${count(vocab_size)} of them, each ` +
      "with a number."],
    ["The tokens pass through the layers.", `Each becomes a vector of ${count(n_embd)} numbers. ` +
      `In each of the ${n_layer} layers, ${n_head} attention heads collect what they need from ` +
      `the last ${count(block_size)} tokens, and an MLP computes with the result.`],
    ["Every possible next token gets a probability.", "The last vector is compared with all " +
      `${count(vocab_size)} tokens of the vocabulary.`],
    ["One token is drawn.", "Chance decides, by these probabilities as the sampling parameters " +
      "have changed them. The token is added to the text, and all begins again."],
  ];
  $("steps").append(...steps.map(([title, line]) =>
    make("li", {}, make("b", {}, title), ` ${line}`)));
  $("steps").firstChild.append(make("p", { id: "words" }));
}

// The first tokens of the prompt with their ids.
function showWords(ids) {
  const shown = ids.slice(0, 12).map((id) =>
    make("span", { class: "word" }, nameOf(id), make("small", {}, String(id))));
  $("words").replaceChildren("The first of your prompt:", ...shown,
    ids.length > shown.length ? "\u2026" : "");
}
