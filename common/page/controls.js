// The forms that change the run.
import { change, read } from "./api.js";
import { changeText } from "./changes.js";
import { h } from "./dom.js";

const ACTIONS = [
  ["Pause training", "pause", { what: "training" }],
  ["Pause offers", "pause", { what: "offers" }],
  ["Resume", "resume"],
  ["Checkpoint", "checkpoint"],
  ["Cut", "cut"],
];

// place: element of the forms. done: called after each reply.
export function drawControls(place, done) {
  const outcome = h("p", { class: "outcome", role: "status" });
  const send = async (doing, ...sent) => {
    outcome.className = "outcome";
    outcome.textContent = `${doing}: requested; it takes effect when no version is in training`;
    try {
      const reply = await change(...sent);
      const version = reply.state === "applied" ? ` at version ${reply.version}` : "";
      outcome.textContent = [`${changeText(reply)}: ${reply.state}${version}`, reply.message].filter(Boolean).join(": ");
    } catch (error) {
      outcome.className = "outcome refused";
      outcome.textContent = `${doing}: ${error.message}`;
    }
    await done();
  };
  const button = (text, action, body) =>
    h("button", { type: "button", on: { click: () => send(text, "POST", `/v1/actions/${action}`, body) } }, text);
  place.replaceChildren(
    h("div", { class: "buttons", role: "group", "aria-label": "Actions" }, ...ACTIONS.map((one) => button(...one)), ...stop(send)),
    setting(send), outcome);
}

// The run ends only after a second press.
function stop(send) {
  const sure = h("button", { type: "button", class: "danger", hidden: true }, "Stop the run: checkpoint, then end");
  const keep = h("button", { type: "button", hidden: true }, "Keep the run");
  const first = h("button", { type: "button" }, "Stop …");
  const ask = (asked) => {
    [sure.hidden, keep.hidden, first.hidden] = [!asked, !asked, asked];
    (asked ? keep : first).focus();
  };
  first.addEventListener("click", () => ask(true));
  keep.addEventListener("click", () => ask(false));
  sure.addEventListener("click", () => { ask(false); send("Stop", "POST", "/v1/actions/stop"); });
  return [first, sure, keep];
}

function setting(send) {
  const key = h("select", { id: "setting" }), value = h("input", { id: "value", autocomplete: "off", spellcheck: "false" });
  const hint = h("span", { class: "hint" });
  let known = { generation: 0, settings: {}, applies_from: {} };
  const show = () => {
    value.value = JSON.stringify(known.settings[key.value] ?? null);
    hint.textContent = known.applies_from[key.value] ? `takes effect: ${known.applies_from[key.value]}` : "";
  };
  const load = async () => {
    const chosen = key.value || "learner.optimizer.lr";
    known = await read("/v1/settings");
    key.replaceChildren(...Object.keys(known.settings).map((name) => h("option", { value: name, selected: name === chosen }, name)));
    show();
  };
  key.addEventListener("change", show);
  key.addEventListener("focus", () => { if (!key.options.length) load(); });
  const submit = async (event) => {
    event.preventDefault();
    let parsed;
    try { parsed = JSON.parse(value.value); } catch { parsed = value.value; }
    await send(`Set ${key.value}`, "PATCH", "/v1/settings", { [key.value]: parsed }, { "If-Match": `"${known.generation}"` });
    await load().catch(() => {});
  };
  load().catch(() => {});
  return h("form", { class: "setting", on: { submit } },
    h("label", { for: "setting" }, "Setting"), key, h("label", { for: "value" }, "Value (JSON)"), value,
    h("button", { type: "submit" }, "Set"), hint);
}
