// Erasing what is selected, and taking it back.

import { announce, element, facts, make, shorten, showError } from "./elements.js";
import { bytes, seconds, tokens } from "./figures.js";
import { chosenMethod } from "./methods.js";
import { clear, count, onSelect, select, selectCharacters, selected, selectedText, selectMessage } from "./selection.js";
import { request } from "./server.js";
import { during, onChange, path, refresh, session } from "./session.js";

export const named = ({ method, parameters }) => {
  const shown = Object.entries(parameters).filter(([, value]) => value !== null && String(value).length < 24);
  return shown.length ? `${method}(${shown.map(([name, value]) => `${name}=${value}`).join(", ")})` : method;
};

async function erase() {
  const [first, last] = selected();
  const span = [session.tokens[first].start, session.tokens[last].end];
  await attempt("erasing", async () => {
    const body = { spans: [span], ...chosenMethod(), undoable: element("undoable").checked };
    const { receipt } = await request("POST", path("/erase"), body);
    await refresh();
    announce(`Erased ${tokens(receipt.erased)} by ${receipt.method} in ${seconds(receipt.seconds)}, ${receipt.exact ? "exact" : "approximate"}`);
  });
}

export async function undo(steps) {
  await attempt("erasing", async () => {
    await request("POST", path("/undo"), { steps });
    await refresh();
    announce(steps === 1 ? "Undone" : `${steps} steps undone`);
  });
}

async function attempt(doing, work) {
  showError("erase-error", null);
  try {
    await during(doing, work);
  } catch (error) {
    showError("erase-error", error);
  }
}

function suggest() {
  const { erase: what, messages } = session.example;
  if (typeof what === "string") {
    const start = session.tokens.map((token) => token.text).join("").indexOf(what);
    selectCharacters(start, start + what.length);
  } else {
    selectMessage(what.message ?? messages.findIndex((message) => message.role === "tool" && message.tool_call_id === what.tool_call_id));
  }
  // What the template writes around a message is selected too, and may be hidden.
  [...document.querySelectorAll("#transcript [aria-selected=true]")].find((node) => node.checkVisibility())
    ?.scrollIntoView({ block: "center" });
}

function showSelected() {
  const bounds = session.view ? selected() : null;
  element("selected").replaceChildren(...(bounds
    ? [make("strong", {}, `${tokens(count(bounds))} selected`), make("q", {}, shorten(selectedText(bounds), 240))]
    : [make("span", { class: "none" }, "Nothing is selected: drag over the text, tap a word, or move with the arrow keys.")]));
  element("erase-button").disabled = session.doing !== null || bounds === null;
  element("clear").disabled = bounds === null;
}

function showReceipt() {
  const receipt = session.view.receipts.at(-1);
  if (!receipt) {
    element("receipt").replaceChildren();
    return;
  }
  element("receipt").replaceChildren(make("h3", {}, "Receipt"), make("p", { class: receipt.exact ? "state exact" : "state" },
    receipt.exact ? "exact: the cache equals one that never read it" : "approximate: audit it to see how near it is to exact"),
  facts([
    ["Method", named(receipt)], ["Erased", tokens(receipt.erased)], ["Run again", tokens(receipt.recomputed)],
    ["Time", seconds(receipt.seconds)], ["Written", bytes(receipt.bytes_written)],
    ["Kept for undo", receipt.undo_bytes ? bytes(receipt.undo_bytes) : "nothing"],
  ]));
}

element("erase-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!element("erase-button").disabled) erase();
});
element("undo").addEventListener("click", () => undo(1));
element("clear").addEventListener("click", () => { getSelection().removeAllRanges(); clear(); });
element("suggest").addEventListener("click", suggest);

onSelect(showSelected);
onChange((contents) => {
  if (!session.view) return;
  showSelected();
  element("undo").disabled = session.doing !== null || session.view.undo_steps === 0;
  element("suggest").hidden = session.example === null;
  element("suggest").disabled = session.doing !== null;
  element("erase-form").setAttribute("aria-busy", String(session.doing === "erasing"));
  element("erase-button").textContent = session.doing === "erasing" ? "Erasing …" : "Erase";
  showReceipt();
  if (contents) showError("erase-error", null);
});
