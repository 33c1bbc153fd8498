// The changes that people requested, newest first.
import { clock, h } from "./dom.js";

export function changeText(change) {
  if (change.kind !== "settings") return [change.kind, ...Object.values(change.what)].join(" ");
  return Object.entries(change.what)
    .map(([key, value]) => `${key}: ${JSON.stringify(change.before?.[key] ?? null)} → ${JSON.stringify(value)}`)
    .join(", ");
}

export function drawChanges(place, changes) {
  if (!changes.length) return place.replaceChildren(h("p", {}, "No change was requested of this learner."));
  const rows = [...changes].reverse().map((change) => h("tr", {},
    h("td", {}, clock(change.requested_at)), h("td", { "data-name": "by" }, change.caller.name),
    h("td", { class: "words" }, changeText(change)),
    h("td", { class: "words" }, change.state === "applied" ? `applied at version ${change.version}` : [change.state, change.message].filter(Boolean).join(": "))));
  const head = h("tr", {}, ...["requested (UTC)", "by", "change", "state"].map((name) => h("th", { scope: "col" }, name)));
  place.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)));
}
