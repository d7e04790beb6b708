// Elements and pictures of the page.

const SVG = ["svg", "path", "line", "text"];

// An HTML or SVG element with attributes; one that begins with "on" listens to an event.
function make(name, attributes = {}, ...children) {
  const element = SVG.includes(name) ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const count = (n) => n.toLocaleString("en-US");

function percent(p) {
  if (p < 0.0001) return "<0.01%";
  return p >= 0.0995 ? `${Math.round(100 * p)}%` : `${(100 * p).toPrecision(2)}%`;
}

// The losses of a run over its steps: of every batch, and of both splits at each evaluation.
// chance is the loss of a guess among all tokens.
function lossCurve({ loss, evaluations }, chance) {
  const [width, height, left, right, top, bottom] = [640, 240, 28, 8, 8, 28];
  const lines = { batches: loss, training: evaluations.map(([step, training]) => [step, training]),
    validation: evaluations.map(([step, , validation]) => [step, validation]) };
  const points = Object.values(lines).flat(), losses = points.map(([, y]) => y);
  const last = Math.max(1, ...points.map(([step]) => step));
  const [low, high] = [Math.floor(Math.min(...losses)), Math.max(chance, ...losses) + 0.1];
  const x = (step) => left + (width - left - right) * step / last;
  const y = (value) => top + (height - top - bottom) * (high - value) / (high - low);
  const level = (value, name) => make("line",
    { class: name, x1: left, x2: width - right, y1: y(value), y2: y(value) });
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `The loss over ${count(last)} steps` }, level(chance, "chance"));
  for (let tick = low; tick <= high; tick++) {
    svg.append(level(tick, "grid"),
      make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const [step, anchor] of [[0, "start"], [Math.round(last / 2), "middle"], [last, "end"]]) {
    svg.append(make("text", { x: x(step), y: height - 4, "text-anchor": anchor }, count(step)));
  }
  for (const [name, line] of Object.entries(lines)) {
    const d = line.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
    if (line.length) svg.append(make("path", { class: name, d: `M${d.join("L")}` }));
  }
  return svg;
}

// The attention of one head, a bar for each of the last tokens; a full one is a quarter or more.
function drawHead(canvas, weights) {
  const context = canvas.getContext("2d"), { width, height } = canvas, bar = 2;
  const shown = weights.slice(-width / bar), highest = Math.max(0.25, ...shown);
  context.clearRect(0, 0, width, height);
  context.fillStyle = getComputedStyle(canvas).color;
  shown.forEach((weight, i) => {
    const tall = height * weight / highest;
    context.fillRect(width - bar * (shown.length - i), height - tall, bar - 0.5, tall);
  });
}
