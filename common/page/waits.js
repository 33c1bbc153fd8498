// Who waits for whom, and since when.
import { duration, h } from "./dom.js";

export function drawWaits(place, waits) {
  const rows = waits.map((one) => h("tr", { class: one.waits_for ? "waiting" : "" },
    h("th", { scope: "row" }, one.who),
    h("td", { class: "words" }, one.waits_for ? `waits for ${one.waits_for}` : one.does),
    h("td", { "data-name": "on whom" }, one.on || "–"), h("td", { "data-name": "for" }, one.seconds === null ? "–" : duration(one.seconds))));
  const head = h("tr", {}, ...["who", "what", "on whom", "for"].map((name) => h("th", { scope: "col" }, name)));
  place.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)));
}
