// The server's contract as JSON: calls with one answer, and streams of server-sent events.

import { token } from "./kept.js";

/** What the server says is wrong, or why it could not be asked. `code` is the contract's reason. */
export class ApiError extends Error {
  constructor(message, { code = "", field = "", status = 0, retryAfter = null, reachable = true, details = [] } = {}) {
    super(message);
    Object.assign(this, { code, field, status, retryAfter, reachable, details });
  }
}

function unreachable() {
  return new ApiError("The server cannot be reached.", { code: "UNREACHABLE", reachable: false });
}

function asError(body, response = null) {
  const error = body?.error ?? {};
  const after = Number(response?.headers.get("retry-after") ?? NaN);
  return new ApiError(error.message ?? `The server answered ${response?.status ?? "with an error"}.`, {
    code: error.code ?? "",
    field: error.param ?? "",
    status: response?.status ?? 0,
    retryAfter: Number.isFinite(after) ? after : null,
    details: error.details ?? [],
  });
}

async function send(path, body, signal) {
  const asked = token();
  const headers = asked ? { authorization: `Bearer ${asked}` } : {};
  const options = body === undefined ? { headers, signal } : {
    method: "POST",
    headers: { ...headers, "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (!response.ok) {
    const error = asError(await response.json().catch(() => null), response);
    // Of a token that has been replaced since, nobody needs to hear.
    if (error.status === 401 && token() === asked) dispatchEvent(new CustomEvent("token-refused", { detail: error.message }));
    throw error;
  }
  return response;
}

/** One answer of /api/`method`; without a body it is a GET. */
export async function call(method, body, signal) {
  return (await send(`api/${method}`, body, signal)).json();
}

/** The events of a streaming method as they come. */
export async function* events(method, body, signal) {
  const response = await send(`api/${method}`, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the texts were whole.", { code: "BROKEN", reachable: false });
      }
      if (piece.done) break;
      const parts = (rest + piece.value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield readEvent(part);
    }
    if (rest.trim()) yield readEvent(rest);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readEvent(block) {
  let name = "";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  const value = JSON.parse(data);
  if (name === "error") throw asError(value);
  return value;
}
