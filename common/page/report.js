// The figures and trajectories of a report. RUN holds the data.
import { h } from "./dom.js";
import { drawFigures } from "./figures.js";
import { drawTokens, RATIOS } from "./tokens.js";

const figures = document.getElementById("figures"), trajectories = document.getElementById("trajectories");

function drawTrajectories() {
  const which = h("select", { id: "which" }, ...RUN.trajectories.map((one, i) =>
    h("option", { value: i }, `${one.trajectory}, trained at version ${one.now}`)));
  const ratio = h("select", { id: "ratio" }, ...Object.entries(RATIOS).map(([name, text]) => h("option", { value: name }, text)));
  const place = h("div", {});
  const draw = () => drawTokens(place, RUN.trajectories[which.value], ratio.value);
  for (const one of [which, ratio]) one.addEventListener("change", draw);
  trajectories.replaceChildren(
    h("div", { class: "choice" }, h("label", { for: "which" }, "Trajectory"), which, h("label", { for: "ratio" }, "Ground"), ratio), place);
  draw();
}

if (RUN.points.length) {
  drawFigures(figures, RUN.points);
  addEventListener("resize", () => drawFigures(figures, RUN.points));
}
if (RUN.trajectories.length) drawTrajectories();
