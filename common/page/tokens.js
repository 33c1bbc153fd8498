// One trajectory, token by token: ground by log-ratio, underline by version, struck when removed from the loss.
import { h, number } from "./dom.js";

const FULL = 0.5;  // nats at which the ground is strongest
const AGES = 8;  // underlines in style: age 0 to 7
export const RATIOS = {
  discrepancy: "log discrepancy: proximal − behavior",
  staleness: "log staleness ratio: current − proximal",
};

function ratioOf(trajectory, i, name) {
  const [high, low] = name === "discrepancy" ? ["proximal", "behavior"] : ["current", "proximal"];
  const a = trajectory[high][i], b = trajectory[low][i];
  return a === null || b === null || trajectory.versions[i] < 0 ? null : a - b;
}

function ground(ratio) {
  if (ratio === null) return null;
  const strength = 100 * Math.min(1, Math.sqrt(Math.abs(ratio) / FULL));
  return `color-mix(in srgb, var(${ratio > 0 ? "--above" : "--below"}) ${strength.toFixed(0)}%, transparent)`;
}

function why(trajectory, i, name) {
  const version = trajectory.versions[i];
  const text = JSON.stringify(trajectory.text[i]);
  if (version < 0) return `${text}: not trained on (prompt, tool output, or beyond the staleness bound)`;
  const removed = trajectory.removed[i];
  const fate = removed === null ? "whether it was removed was not recorded" : removed.length ? `removed by ${removed.join(", ")}` : "trained on";
  return `${text}: ${fate}. Sampled by version ${version}, staleness ${trajectory.now - version}. `
    + `${RATIOS[name].split(":")[0]} ${number(ratioOf(trajectory, i, name))} nats; log-probs: behavior ${number(trajectory.behavior[i])}, `
    + `proximal ${number(trajectory.proximal[i])}${trajectory.exact[i] ? " (old)" : ""}, current ${number(trajectory.current[i])}; `
    + `advantage ${number(trajectory.advantages[i])}.`;
}

// trajectory: columns as records.py makes them. The tokens are one stop of the Tab key; arrow keys move between them.
export function drawTokens(place, trajectory, name = "discrepancy") {
  const detail = h("p", { class: "why", "aria-live": "polite" }, "Hover over a token, or move with the arrow keys, to see its values.");
  const spans = trajectory.text.map((text, i) => token(trajectory, i, name, text));
  const body = h("div", { class: "tokens", role: "group", "aria-label": `Tokens of ${trajectory.trajectory}` }, ...spans);
  let at = 0;
  const move = (i, focus) => {
    spans[at]?.setAttribute("tabindex", -1);
    at = Math.max(0, Math.min(spans.length - 1, i));
    spans[at].setAttribute("tabindex", 0);
    if (focus) spans[at].focus();
    detail.textContent = why(trajectory, at, name);
  };
  body.addEventListener("pointerover", (event) => {
    const i = spans.indexOf(event.target);
    if (i >= 0) detail.textContent = why(trajectory, i, name);
  });
  body.addEventListener("focusin", (event) => move(spans.indexOf(event.target), false));
  body.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    move(at + steps[event.key], true);
  });
  spans[0]?.setAttribute("tabindex", 0);
  place.replaceChildren(key(trajectory), body, detail);
}

function token(trajectory, i, name, text) {
  const version = trajectory.versions[i], removed = trajectory.removed[i];
  const classes = ["token"];
  if (version >= 0) classes.push(`age-${(trajectory.now - version) % AGES}`);
  if (removed?.length) classes.push("struck");
  const made = h("span", { class: classes.join(" "), tabindex: -1 }, text);
  const color = ground(ratioOf(trajectory, i, name));
  if (color) made.style.background = color;
  return made;
}

function key(trajectory) {
  const versions = [...new Set(trajectory.versions.filter((version) => version >= 0))].sort((a, b) => a - b);
  return h("p", { class: "key" },
    h("span", { class: "sample above" }, "more likely"), h("span", { class: "sample below" }, "less likely"),
    ...versions.map((version) => h("span", { class: `token age-${(trajectory.now - version) % AGES}` }, `version ${version}`)),
    h("span", { class: "token struck" }, "removed"));
}
