// Drawing: elements, line charts, matrices. Text reaches the page through textContent alone.

const NS = "http://www.w3.org/2000/svg";

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== "") node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => put(document.createElementNS(NS, tag), attributes, children);

// ---- numbers

function number(value, digits = 3) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  for (const [unit, word] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return trim((value / (word === "k" ? 1e3 : unit)).toPrecision(digits)) + " " + word;
  return size >= 100 ? Math.round(value).toLocaleString("en") : trim(value.toPrecision(digits));
}
const trim = (text) => (text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text);
const whole = (value) => (Math.round(value) || 0).toLocaleString("en");
function duration(seconds) {
  if (seconds === null) return "–";
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
}
function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(wanted, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999) ?? rough;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

// ---- the tip beside the pointer

const tip = el("div", { class: "tip", hidden: "" });
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  tip.style.left = Math.max(left, 4) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 4) + "px";
}
const hideTip = () => { tip.hidden = true; };

// ---- lines

// series: [{name, colour, points: [[step, value]], width?, opacity?, dots?}]; levels: [{name, value}] as dashed lines
function lineChart({ series, levels = [], floor, ceiling, format = number, height = 210 }) {
  series = series.filter((s) => s.points.length);
  if (!series.length) return el("p", { class: "note" }, "Nothing was recorded.");
  const width = 540, left = 46, right = 10, top = 8, bottom = 24;
  const steps = series.flatMap((s) => s.points.map((p) => p[0]));
  const values = [...series.flatMap((s) => s.points.map((p) => p[1])), ...levels.map((l) => l.value)];
  let [x0, x1] = [Math.min(...steps), Math.max(...steps)];
  let [y0, y1] = [floor ?? Math.min(...values), Math.max(...values, ceiling ?? -Infinity)];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  if (y1 <= y0) [y0, y1] = floor === undefined ? [y0 - 0.5 * (Math.abs(y0) || 1), y1 + 0.5 * (Math.abs(y1) || 1)] : [y0, y0 + 1];
  if (floor === undefined) y0 -= 0.05 * (y1 - y0);
  if (ceiling === undefined) y1 += 0.06 * (y1 - y0);
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => top + (1 - (value - y0) / (y1 - y0)) * (height - top - bottom);
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const value of ticks(y0, y1, 4)) {
    chart.append(svg("line", { class: "grid-line", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, format(value)));
  }
  for (const step of ticks(x0, x1, 6).filter(Number.isInteger))
    chart.append(svg("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, whole(step)));
  for (const { name, value } of levels) {
    chart.append(svg("line", { class: "level", stroke: "var(--muted)", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { x: width - right - 2, y: y(value) - 4, "text-anchor": "end" }, `${name} ${format(value)}`));
  }
  for (const s of series) {
    if (s.points.length > 1)
      chart.append(svg("path", {
        class: "line", stroke: s.colour, "stroke-width": s.width ?? 1.8, opacity: s.opacity,
        d: "M" + s.points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("L"),
      }));
    if (s.dots || s.points.length === 1)
      for (const p of s.points) chart.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, fill: s.colour }));
  }
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  chart.append(cursor, svg("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom, fill: "transparent" }));
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = x0 + (((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * (x1 - x0);
    const near = series.map((s) => ({ s, p: s.points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)) }));
    const step = near.reduce((a, b) => (Math.abs(b.p[0] - at) < Math.abs(a.p[0] - at) ? b : a)).p[0];
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible");
    const said = near.filter(({ p }) => p[0] === step).map(({ s, p }) => `${s.name}  ${format(p[1], 5)}`);
    showTip(event, [`step ${whole(step)}`, ...said].join("\n"));
  });
  chart.addEventListener("pointerleave", () => { hideTip(); cursor.setAttribute("visibility", "hidden"); });
  const named = series.filter((s) => s.name && !s.quiet);
  return [named.length > 1 ? legend(named) : null, chart];
}
const legend = (series) =>
  el("div", { class: "legend" }, series.map((s) => el("span", null, el("i", { style: `border-color:${s.colour}` }), s.name)));

// ---- colours of cells

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
function between(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (place - i)));
}
const AROUND_ONE = {
  light: [[33, 84, 150], [97, 152, 202], [243, 243, 240], [222, 120, 88], [158, 26, 36]],
  dark: [[126, 186, 255], [52, 104, 160], [36, 41, 48], [176, 76, 54], [255, 148, 120]],
};
const FROM_ZERO = {
  light: [[245, 245, 242], [196, 205, 226], [129, 134, 190], [86, 55, 138], [45, 8, 75]],
  dark: [[34, 39, 46], [62, 62, 110], [113, 91, 170], [183, 132, 214], [246, 206, 250]],
};
const shade = (stops, t) => between(stops[isDark() ? "dark" : "light"], t);
// a share of 1 is neutral, 0 one end, `high` and more the other
const aroundOne = (high) => (v) => shade(AROUND_ONE, v <= 1 ? v / 2 : 0.5 + Math.min((v - 1) / (high - 1), 1) / 2);
const fromZero = (high) => (v) => shade(FROM_ZERO, high > 0 ? v / high : 0);

// ---- matrices

const redraws = [];
function redrawAll() { for (const draw of redraws) draw(); }

// cell(row, column) -> {value, text, crossed?}; `set` draws another one of the same size
function matrix({ rows, columns, rowNames, columnNames, axis, cellHeight, colour, cell, label, labels = 16 }) {
  const canvas = el("canvas", { role: "img", "aria-label": label });
  const height = Math.max(rows * (cellHeight ?? Math.min(Math.max(Math.round(300 / rows), 5), 30)), 14);
  canvas.style.height = height + "px";
  let state = { cell, colour };
  function draw() {
    const box = canvas.getBoundingClientRect(), ratio = Math.max(devicePixelRatio || 1, 2);
    const width = Math.max(box.width, 1);
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d"), w = canvas.width / columns, h = canvas.height / rows;
    const gap = w > 7 * ratio && h > 7 * ratio ? ratio : 0;
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const found = state.cell(row, column);
        if (found === null) continue;
        const [x, y] = [Math.round(column * w), Math.round(row * h)];
        const [right, under] = [Math.round((column + 1) * w), Math.round((row + 1) * h)];
        pen.fillStyle = `rgb(${state.colour(found.value).join()})`;
        pen.fillRect(x, y, right - x - gap, under - y - gap);
        if (found.crossed && w > 4 * ratio && h > 4 * ratio) {
          const side = Math.min(w, h) * 0.22, [cx, cy] = [(x + right - gap) / 2, (y + under - gap) / 2];
          pen.strokeStyle = isDark() ? "#14181d" : "#ffffff"; pen.lineWidth = 1.6 * ratio;
          pen.beginPath();
          pen.moveTo(cx - side, cy - side); pen.lineTo(cx + side, cy + side);
          pen.moveTo(cx + side, cy - side); pen.lineTo(cx - side, cy + side);
          pen.stroke();
        }
      }
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * rows), rows - 1);
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * columns), columns - 1);
    const found = row >= 0 && column >= 0 ? state.cell(row, column) : null;
    if (found) showTip(event, found.text); else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  redraws.push(draw);
  const every = (count, most) => Math.max(1, Math.ceil(count / most));
  const rowStep = every(rows, Math.max(Math.floor(height / 15), 1));
  const columnStep = every(columns, labels);
  const names = el("div", { class: "rows", style: `height:${height}px` });
  for (let row = 0; row < rows; row += rowStep)
    names.append(el("span", { style: `top:${((row + 0.5) / rows) * 100}%` }, rowNames(row)));
  names.style.width = `${Math.max(...[...names.children].map((n) => n.textContent.length)) * 6.4 + 2}px`;
  const feet = el("div", { class: "columns" });
  for (let column = 0; column < columns; column += columnStep)
    feet.append(el("span", { style: `left:${((column + 0.5) / columns) * 100}%` }, columnNames(column)));
  const node = el("div", { class: "matrix" }, names, canvas, feet, axis ? el("div", { class: "axis" }, axis) : null);
  return { node, set(changes) { state = { ...state, ...changes }; draw(); } };
}

function scale(colour, low, high, from, to) {
  const canvas = el("canvas", { width: 180, height: 1 });
  redraws.push(() => {
    const pen = canvas.getContext("2d");
    for (let x = 0; x < 180; x++) {
      pen.fillStyle = `rgb(${colour(low + ((high - low) * x) / 179).join()})`;
      pen.fillRect(x, 0, 1, 1);
    }
  });
  return el("div", { class: "scale" }, from, canvas, to);
}
