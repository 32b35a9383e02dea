// Sessions of the server: stored states, each with the tokens that it has read.

import { getJson, request } from "./api.js";

const path = (id, rest = "") => `v1/sessions/${encodeURIComponent(id)}${rest}`;

export async function list() {
  return (await getJson("v1/sessions?limit=100", { background: true })).data;
}

/** A session with its messages, if it has any. */
export const look = (id) => getJson(path(id, "?messages=true"));

/** A new session with the same state. */
export const fork = (id) => getJson(path(id, "/fork"), { method: "POST", json: {} });

/** Deletes sessions that may be gone already; what cannot be deleted expires on the server. */
export function forget(...ids) {
  for (const id of ids.filter(Boolean)) request(path(id), { method: "DELETE", background: true }).catch(() => {});
}

export async function download(id, name) {
  const blob = await (await request(path(id, "/state"))).blob();
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = `${name.replace(/[^\p{L}\p{N} ._-]+/gu, "").trim() || "conversation"}.safetensors`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  return blob.size;
}

export const upload = (file) =>
  getJson("v1/sessions", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
