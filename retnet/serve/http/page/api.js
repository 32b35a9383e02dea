// Requests to the server: the key, errors in the API's form, and streams of events.

const KEY = "retnet.key";
let askForKey = async () => false;
let asking = null;
let declined = false; // the user closed the dialog: requests of the page's own do not open it again

/** What asks the user for a key: a function of the refusal's message that resolves to whether one was given. */
export function onMissingKey(ask) {
  askForKey = ask;
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
  declined = false;
}

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** What the user can do, or "". */
  get advice() {
    if (this.code === "context_length_exceeded") return "Fork at an earlier message, or start a new conversation.";
    if (this.code === "no_chat_template") return "Use the Completion view, which needs none.";
    if (this.status === 0) return "Check that the server is running, then try again.";
    if (this.status === 401) return "The server serves those who have a key alone.";
    if (this.status === 429) {
      return this.retryAfter ? `Try again in ${this.retryAfter} s.` : "Try again in a moment.";
    }
    if (this.status >= 500) return "Try again. If it fails again, the server's log says more.";
    return "";
  }
}

/**
 * A response of the server; raises ApiError for a refusal. Relative paths work behind a proxy's prefix, too.
 * timeout: ms for each attempt. background: the user did not ask for it, so that a missing key is not asked for again once that was declined.
 */
export async function request(path, { method = "GET", json, body, signal, headers = {}, timeout, background = false } = {}) {
  for (;;) {
    const used = sessionStorage.getItem(KEY);
    const sent = { Accept: "application/json, text/event-stream", ...headers };
    if (used) sent.Authorization = `Bearer ${used}`;
    if (json !== undefined) sent["Content-Type"] = "application/json";
    const response = await reach(new URL(path, document.baseURI), {
      method,
      headers: sent,
      body: json === undefined ? body : JSON.stringify(json),
      signal: timeout ? AbortSignal.timeout(timeout) : signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status !== 401 || (background && declined) || !(await gotKey(used, error.message))) throw error;
  }
}

export async function getJson(path, options) {
  return read(await request(path, options));
}

async function read(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server's answer could not be read.", { status: 502 });
  }
}

async function reach(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.name === "TimeoutError" ? "The server does not answer." : "The server cannot be reached.");
  }
}

/** Whether there is another key to try: one dialog for all requests that wait for it. */
async function gotKey(used, message) {
  if (sessionStorage.getItem(KEY) !== used) return true;
  asking ??= askForKey(used ? message : "").finally(() => (asking = null));
  const given = await asking;
  declined = !given;
  return given;
}

async function errorOf(response) {
  const told = { status: response.status, retryAfter: Number(response.headers.get("Retry-After")) || null };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...told, code: error.code, param: error.param });
  } catch {
    return new ApiError(`The server answered ${response.status} ${response.statusText}`.trim() + ".", told);
  }
}

/** The JSON objects of a stream of events, until [DONE]. Raises ApiError for an error event and for a broken stream. */
export async function* events(path, json, signal) {
  const response = await request(path, { method: "POST", json, signal });
  let done = false;
  for await (const data of eventData(response.body)) {
    done ||= data === "[DONE]";
    if (done) continue; // up to the end of the response, so that its connection can be used again
    const value = JSON.parse(data);
    if (value.error) throw new ApiError(value.error.message, { status: 500, ...value.error });
    yield value;
  }
  if (!done) throw new ApiError("The connection ended before the answer did.");
}

/** The data of each event of a text/event-stream. Comments, such as those that keep a connection alive, are skipped. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.");
  } finally {
    reader.cancel().catch(() => {}); // a stream that broke off has nothing to cancel
  }
}
