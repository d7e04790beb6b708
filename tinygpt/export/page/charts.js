// Pictures and elements of the page.

// An HTML or SVG element with attributes; those that begin with "on" listen to events.
function make(name, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "line", "text", "circle"].includes(name);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(key, value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const count = (n) => n.toLocaleString("en-US");
const percent = (p) => p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.0001 ? `${(100 * p).toPrecision(2)}%` : "< 0.01%";

// The loss of a run over its steps: batches as a thin line, the validation split as a strong one.
function lossCurve({ loss, evaluations }, chance) {
  const [width, height, left, bottom] = [640, 220, 34, 24];
  const lines = [["loss", loss], ["train", evaluations.map(([step, train]) => [step, train])],
    ["validation", evaluations.map(([step, , validation]) => [step, validation])]];
  const points = lines.flatMap(([, line]) => line);
  const last = Math.max(...points.map(([step]) => step), 1);
  const low = Math.floor(Math.min(...points.map(([, y]) => y)));
  const high = Math.max(Math.ceil(Math.max(...points.map(([, y]) => y), chance) * 4) / 4, low + 1);
  const x = (step) => left + (width - left - 8) * step / last;
  const y = (value) => 8 + (height - 8 - bottom) * (high - value) / (high - low);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Loss over ${count(last)} steps, in nats per token` });
  for (let tick = low; tick <= high; tick++) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) }),
      make("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const step of [0, last / 2, last]) {
    svg.append(make("text", { x: x(step), y: height - 6, "text-anchor": step ? step === last ? "end" : "middle" : "start" },
      count(Math.round(step))));
  }
  svg.append(make("line", { class: "chance", x1: left, x2: width - 8, y1: y(chance), y2: y(chance) }));
  for (const [name, line] of lines) {
    const d = line.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
    if (line.length) svg.append(make("path", { class: name, d: d.join("") }));
  }
  return svg;
}

// One head's attention over its window, a bar for each token, the newest at the right.
function drawHead(canvas, weights) {
  const context = canvas.getContext("2d"), { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  context.fillStyle = getComputedStyle(canvas).color;
  const shown = weights.slice(-width / 2), highest = Math.max(...shown, 0.05);
  shown.forEach((weight, i) => {
    const tall = height * weight / highest;
    context.fillRect(width - 2 * (shown.length - i), height - tall, 1.5, tall);
  });
}
