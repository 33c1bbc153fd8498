// The page of a running learner: asks for news every two seconds while it is visible.
import { read, session } from "./api.js";
import { Batches } from "./batches.js";
import { drawChanges } from "./changes.js";
import { drawControls } from "./controls.js";
import { drawFigures } from "./figures.js";
import { drawWaits } from "./waits.js";

const EVERY_MS = 2000, MOST_POINTS = 1000;
const at = (id) => document.getElementById(id);
let points = [], writer = null, batches = null;

function showState(status) {
  const paused = Object.entries(status.paused ?? {}).map(([what, who]) => `${what} paused by ${who}`);
  at("run").textContent = `run ${status.run ?? ""}`;
  at("state").textContent = [`version ${status.version ?? "–"}`, `${status.trained_versions ?? 0} of ${status.versions ?? "–"} trained`,
    ...paused, status.waiting_for ? `waits for ${status.waiting_for}` : "training"].join(" · ");
  at("evaluation").textContent = status.evaluation ? `held-out tasks: ${status.evaluation}` : "";
}

async function showPoints(status) {
  if (status.writer !== writer) [points, writer] = [[], status.writer];  // a restart may go back to its checkpoint
  const after = points.length ? points[points.length - 1].version : -1;
  const news = (await read(`/v1/points?after=${after}`)).points;
  if (!news.length && points.length) return;
  points = [...points, ...news].slice(-MOST_POINTS);
  drawFigures(at("figures"), points);
}

async function refresh() {
  try {
    const [status, { waits }, { changes }] = await Promise.all([read("/v1/status"), read("/v1/waits"), read("/v1/changes?limit=50")]);
    at("access").hidden = true;
    at("content").hidden = false;
    showState(status);
    drawWaits(at("waits"), waits);
    drawChanges(at("changes"), changes);
    if (!batches) {
      drawControls(at("controls"), refresh);
      batches = new Batches(at("batches"));
    }
    await showPoints(status);
    await batches.refresh();
    at("problem").textContent = "";
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForToken(error);
    else at("problem").textContent = error.status ? error.message : "The learner does not answer; the page asks again every two seconds.";
  }
}

function askForToken(error) {
  if (!at("access").hidden) return;
  at("access").hidden = false;
  at("problem").textContent = session.get() ? error.message : "";
  at("token").focus();
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  session.set(at("token").value.trim());
  at("token").value = "";
  at("access").hidden = true;
  refresh();
});
at("forget").addEventListener("click", () => { session.set(""); location.reload(); });
addEventListener("resize", () => { if (points.length) drawFigures(at("figures"), points); });
(async () => {
  for (;;) {
    if (!document.hidden && at("access").hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
})();
