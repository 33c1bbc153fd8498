// Chooses a trajectory of a recorded batch.
import { read } from "./api.js";
import { h } from "./dom.js";
import { drawTokens, RATIOS } from "./tokens.js";

export class Batches {
  constructor(place) {
    this.version = h("select", { id: "batch", on: { change: () => this.openBatch() } });
    this.row = h("select", { id: "row", on: { change: () => this.openRow() } });
    this.ratio = h("select", { id: "ratio", on: { change: () => this.draw() } },
      ...Object.entries(RATIOS).map(([name, text]) => h("option", { value: name }, text)));
    this.place = h("div", {});
    this.more = h("p", { class: "hint" });
    place.replaceChildren(
      h("div", { class: "choice" },
        h("label", { for: "batch" }, "Version trained at"), this.version,
        h("label", { for: "row" }, "Trajectory"), this.row,
        h("label", { for: "ratio" }, "Ground"), this.ratio),
      this.place, this.more);
    this.known = "";
  }

  async refresh() {
    const { versions } = await read("/v1/batches");
    const now = versions.join();
    if (now === this.known) return;
    const first = !this.known;
    this.known = now;
    const chosen = this.version.value;
    this.version.replaceChildren(...[...versions].reverse().map((version) => h("option", { value: version, selected: String(version) === chosen }, version)));
    if (!versions.length) this.place.replaceChildren(h("p", {}, "This run records no batches (learner.record)."));
    else if (first || this.version.value !== chosen) await this.openBatch();
  }

  async openBatch() {
    const { trajectories } = await read(`/v1/batches/${this.version.value}`);
    this.row.replaceChildren(...trajectories.map((one) => h("option", { value: one.row },
      `${one.trajectory} (${one.tokens} tokens${one.removed === null ? "" : `, ${one.removed} removed`})`)));
    if (trajectories.length) await this.openRow();
  }

  async openRow() {
    this.trajectory = await read(`/v1/batches/${this.version.value}/${this.row.value}`);
    this.draw();
  }

  draw() {
    if (!this.trajectory) return;
    drawTokens(this.place, this.trajectory, this.ratio.value);
    const shown = this.trajectory.text.length, { length } = this.trajectory;
    this.more.textContent = shown < length ? `The first ${shown} of ${length} tokens.` : "";
  }
}
