// The session that the page shows, and what is being done with it. Everyone who shows part of it listens for changes.

import { request } from "./server.js";

export const session = {
  // As the server tells it, with its contents; null before a text was chosen.
  view: null,
  tokens: [],
  // The example that it was made of; null for a pasted text.
  example: null,
  // What runs now: reading, erasing, answering or auditing; else null.
  doing: null,
};

const listeners = [];

// `act` is called with whether other tokens, or other ones of them as live, are shown.
export function onChange(act) { listeners.push(act); }

function tell(contents) { for (const act of listeners) act(contents); }

export const path = (rest = "") => `/v1/sessions/${encodeURIComponent(session.view.id)}${rest}`;

export const edited = () => session.view !== null && session.view.receipts.length > 0;

// A session that is busy for someone else is not tried again at once.
const BUSY_MILLISECONDS = 1500;

// Runs `work` while everything that can't be done meanwhile is disabled.
export async function during(doing, work) {
  const focused = document.activeElement;
  let busy = false;
  const end = () => {
    session.doing = null;
    tell(false);
    // A disabled control loses the focus.
    if (document.activeElement === document.body && focused?.isConnected && !focused.disabled) focused.focus();
  };
  session.doing = doing;
  tell(false);
  try {
    return await work();
  } catch (error) {
    // Busy, or changed from elsewhere: what can be done is read anew.
    busy = error.status === 409 && session.view !== null;
    if (busy) await refresh().catch(() => {});
    throw error;
  } finally {
    if (busy) setTimeout(end, BUSY_MILLISECONDS);
    else end();
  }
}

export async function refresh() { await open(session.view.id, session.example); }

export async function open(id, example) {
  const place = `/v1/sessions/${encodeURIComponent(id)}`;
  const [view, tokens] = await Promise.all([request("GET", `${place}?contents=true`), request("GET", `${place}/tokens`)]);
  const another = session.view?.id !== id;
  const changed = another || tokens.data.length !== session.tokens.length
    || tokens.data.some((token, place) => token.live !== session.tokens[place].live);
  Object.assign(session, { view, example });
  if (changed) session.tokens = tokens.data;
  if (another) {
    const address = new URL(location.href);
    address.searchParams.set("session", id);
    history.replaceState(null, "", address);
    for (const act of opened) act();
  }
  tell(changed);
}

const opened = [];

// `act` is called when another session is opened, before its contents are shown.
export function onOpen(act) { opened.push(act); }
