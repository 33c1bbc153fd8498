// One chart with one pair of axes, as SVG of the width of its place. Arrow keys move along the x axis.
import { h, number, svg } from "./dom.js";

const HEIGHT = 220, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 40;

export function ticks(low, high, most) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => span / one <= most);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) found.push(tick);
  return found.map((tick) => Number(tick.toPrecision(12)));
}

function scale(values, fromZero) {
  const known = values.filter((value) => value !== null);
  let low = known.length ? Math.min(...known) : 0, high = known.length ? Math.max(...known) : 1;
  if (fromZero) low = Math.min(0, low);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const margin = (high - low) * 0.04;
  return [fromZero && low === 0 ? 0 : low - margin, high + margin];
}

// spec: { title, yTitle, xTitle, x: [], y: [], bars, fromZero, marks: [{ x, text }] }
export function chart(place, spec) {
  const width = Math.max(240, place.clientWidth);
  const [x0, x1] = scale(spec.x, false), [y0, y1] = scale(spec.y, spec.fromZero || spec.bars);
  const across = (value) => LEFT + ((value - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const up = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const drawing = svg("svg", {
    width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, class: "chart",
    "aria-label": `${spec.title}: ${spec.yTitle} over ${spec.xTitle}, ${spec.x.length} points`,
  });
  axes(drawing, spec, { width, across, up, x: [x0, x1], y: [y0, y1] });
  for (const mark of spec.marks ?? []) {
    if (mark.x < x0 || mark.x > x1) continue;
    const line = svg("line", { x1: across(mark.x), x2: across(mark.x), y1: TOP, y2: HEIGHT - BOTTOM, class: "mark" });
    line.append(svg("title", {}, mark.text));
    drawing.append(line);
  }
  plot(drawing, spec, across, up, up(Math.max(0, y0)));
  const readout = h("p", { class: "readout", "aria-live": "polite" });
  follow(drawing, spec, across, readout);
  place.replaceChildren(drawing, readout);
  show(readout, spec, spec.x.length - 1);
}

function axes(drawing, spec, { width, across, up, x, y }) {
  for (const tick of ticks(...y, 5)) {
    drawing.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: up(tick), y2: up(tick), class: "grid" }));
    drawing.append(svg("text", { x: LEFT - 6, y: up(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks(...x, Math.min(10, width / 70))) {
    if (spec.whole && !Number.isInteger(tick)) continue;
    drawing.append(svg("text", { x: across(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, number(tick)));
  }
  const bottom = HEIGHT - BOTTOM, middle = (TOP + bottom) / 2;
  drawing.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom, class: "axis" }));
  drawing.append(svg("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, spec.xTitle));
  const turned = { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` };
  drawing.append(svg("text", turned, spec.yTitle));
}

function plot(drawing, spec, across, up, base) {
  const points = spec.x.map((x, i) => [x, spec.y[i]]).filter(([, y]) => y !== null && y !== undefined);
  if (spec.bars) {
    for (const [x, y] of points) drawing.append(svg("line", { x1: across(x), x2: across(x), y1: base, y2: up(y), class: "bar" }));
    return;
  }
  // a missing value interrupts the line
  let path = "", pen = "M";
  spec.x.forEach((x, i) => {
    if (spec.y[i] === null || spec.y[i] === undefined) pen = "M";
    else { path += `${pen}${across(x).toFixed(1)} ${up(spec.y[i]).toFixed(1)}`; pen = "L"; }
  });
  drawing.append(svg("path", { d: path, class: "line" }));
  if (points.length < 60) for (const [x, y] of points) drawing.append(svg("circle", { cx: across(x), cy: up(y), r: 2.5, class: "dot" }));
}

function show(readout, spec, i) {
  readout.textContent = i < 0 ? "" : `${spec.xTitle} ${number(spec.x[i])}: ${number(spec.y[i])}`;
}

function follow(drawing, spec, across, readout) {
  const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
  drawing.append(cursor);
  let at = spec.x.length - 1;
  const move = (i) => {
    if (!spec.x.length) return;
    at = Math.max(0, Math.min(spec.x.length - 1, i));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, across(spec.x[at]));
    cursor.setAttribute("visibility", "visible");
    show(readout, spec, at);
  };
  drawing.addEventListener("pointermove", (event) => {
    const x = event.offsetX;
    let nearest = 0;
    spec.x.forEach((value, i) => {
      if (Math.abs(across(value) - x) < Math.abs(across(spec.x[nearest]) - x)) nearest = i;
    });
    move(nearest);
  });
  drawing.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    move(Number.isFinite(steps[event.key]) ? at + steps[event.key] : steps[event.key] < 0 ? 0 : spec.x.length - 1);
  });
}
