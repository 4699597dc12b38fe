// The server's API: JSON requests, answers that stream, and errors as the server tells them.

const KEY = "kveraser key";
let askForKey = () => {};

export class ServerError extends Error {
  constructor(status, { message, code = null }) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function setKey(key) { sessionStorage.setItem(KEY, key); }

export function whenKeyIsMissing(act) { askForKey = act; }

async function send(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server does not answer. Is it still running?" });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const error = new ServerError(response.status, told.error ?? { message: `The server answered with status ${response.status}.` });
  if (wait) error.message += ` (Try again in ${wait} s.)`;
  if (response.status === 401) askForKey(error);
  throw error;
}

export async function request(method, path, body) {
  return (await send(method, path, body)).json();
}

// Calls `take` with every event of an answer, to its end.
export async function stream(path, body, signal, take) {
  const response = await send("POST", path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError(0, { message: "The connection ended before the answer did." });
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(0, told.error);
      take(told);
    }
  }
}
