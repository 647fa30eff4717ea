// Calls to the server. A key, once it is asked for, goes along with each.

import { byId, write } from "./dom.js";

const KEY = "loramux-api-key";

/** What the server answered instead of what was asked for, in its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Answer of a call as JSON, or as text where it is none. Throws Refused. */
export async function ask(path, body, signal) {
  const response = await send(path, body, signal);
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Answers of a streaming call, each as JSON, as they come. Throws Refused, later too. */
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  let rest = "";
  for await (const piece of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + piece).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") {
        return;
      }
      if (data !== "") {
        const event = JSON.parse(data);
        if (event.error) {
          throw new Refused(response.status, wording(event, "the stream failed"));
        }
        yield event;
      }
    }
  }
  throw new Refused(response.status, "the stream ended before the answer did");
}

async function* pieces(readable) {
  const reader = readable.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
    if (body !== undefined) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await fetch(path, options);
    if (response.ok) {
      return response;
    }
    const message = await wordingOf(response);
    if (response.status !== 401) {
      throw new Refused(response.status, message);
    }
    // Another call may have got a new key meanwhile.
    if (sessionStorage.getItem(KEY) === key && !(await keyGiven(message))) {
      throw new Refused(401, message);
    }
  }
}

async function wordingOf(response) {
  const text = await response.text();
  const fallback = `${response.status} ${response.statusText}`.trim();
  try {
    return wording(JSON.parse(text), fallback);
  } catch {
    return text.slice(0, 2000) || fallback;
  }
}

function wording(answer, fallback) {
  const message = answer?.error?.message ?? answer?.message ?? answer?.detail;
  return typeof message === "string" && message !== "" ? message : fallback;
}

let asking = null;
let isDeclined = false;

/** Ask for a key, once for all who wait; false where it is declined. */
function keyGiven(message) {
  if (isDeclined) {
    return Promise.resolve(false);
  }
  asking ??= showKeyDialog(message).finally(() => {
    asking = null;
  });
  return asking;
}

function showKeyDialog(message) {
  const dialog = byId("key-dialog");
  const form = byId("key-form");
  write(byId("key-text"), message);
  byId("key").value = "";
  byId("key-button").hidden = false;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const use = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key").value.trim());
      dialog.close("use");
    };
    const cancel = () => dialog.close("");
    const forget = () => {
      sessionStorage.removeItem(KEY);
      dialog.close("forget");
    };
    const wiring = new AbortController();
    const { signal } = wiring;
    form.addEventListener("submit", use, { signal });
    byId("key-cancel").addEventListener("click", cancel, { signal });
    byId("key-forget").addEventListener("click", forget, { signal });
    dialog.addEventListener(
      "close",
      () => {
        wiring.abort();
        byId("key").value = "";
        isDeclined = dialog.returnValue !== "use";
        resolve(!isDeclined);
      },
      { signal },
    );
  });
}

/** Let the button in the header change the key, where one was asked for; `changed` is called then. */
export function offerKey(changed) {
  byId("key-button").hidden = sessionStorage.getItem(KEY) === null;
  byId("key-button").addEventListener("click", async () => {
    isDeclined = false;
    await keyGiven("The server asks for a key.");
    changed();
  });
}
