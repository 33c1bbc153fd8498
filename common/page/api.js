// Requests to the learner. The token stays in this tab.
const KEPT = "palimpsest-token";

export class Refused extends Error {
  constructor(status, body) {
    super(body.message ?? `the learner answered ${status}`);
    this.status = status;
    this.code = body.code ?? "";
  }
}

export const session = {
  get: () => sessionStorage.getItem(KEPT) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEPT, value) : sessionStorage.removeItem(KEPT)),
};

export async function request(method, path, body, headers = {}) {
  const sent = { ...headers };
  if (session.get()) sent.Authorization = `Bearer ${session.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const reply = await fetch(path, { method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body) });
  const parsed = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, parsed);
  return parsed;
}

export const read = (path) => request("GET", path);

// A repeated request of the browser stays one change.
export function change(method, path, body, headers = {}) {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return request(method, `${path}?wait_s=30`, body, { "Idempotency-Key": key, ...headers });
}
