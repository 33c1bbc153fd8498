// The figures over the versions of a run, from the points that points.py makes of the history.
import { chart } from "./chart.js";
import { h } from "./dom.js";

const BY_VERSION = { xTitle: "version published", at: "version", whole: true };
const FIGURES = [
  { key: "entropy", title: "Entropy", yTitle: "nats", ...BY_VERSION, fromZero: true,
    text: "Mean entropy of the trained tokens. Sign of a fault: a fall to 0." },
  { key: "grad_norm", title: "Gradient norm", yTitle: "norm", ...BY_VERSION, fromZero: true,
    text: "Largest norm over the minibatches, before it is clipped. Sign of a fault: growth over the run." },
  { key: "learning_rate", title: "Learning rate", yTitle: "rate", ...BY_VERSION, fromZero: true,
    text: "The rate of the last minibatch of the version." },
  { key: "length", title: "Length", yTitle: "tokens", ...BY_VERSION, fromZero: true,
    text: "Mean length of the trained trajectories, prompts and tool output included." },
  { key: "cuts", title: "Cut timeline", yTitle: "cuts", xTitle: "running time (min)", at: "minutes", bars: true,
    text: "Changes of version inside a turn, by batch, over the running time of the learner." },
];

// points: oldest first. Draws into `place`, which is kept between calls so that focus stays where it is.
export function drawFigures(place, points) {
  const marks = (at) => points
    .filter((point, i) => i && point.settings !== points[i - 1].settings)
    .map((point) => ({ x: point[at], text: `settings changed (change ${point.settings})` }));
  for (const figure of FIGURES) {
    let drawn = place.querySelector(`[data-figure="${figure.key}"]`);
    if (!drawn) {
      drawn = h("div", { class: "drawing", "data-figure": figure.key });
      place.append(h("figure", { "aria-label": figure.title, class: figure.bars ? "last" : null }, h("h2", {}, figure.title), drawn, h("figcaption", {}, figure.text)));
    }
    if (drawn.contains(document.activeElement)) continue;  // someone reads this figure with the keyboard
    chart(drawn, { ...figure, marks: marks(figure.at), x: points.map((point) => point[figure.at]), y: points.map((point) => point[figure.key]) });
  }
}
