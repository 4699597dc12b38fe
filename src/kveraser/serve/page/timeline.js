// What was done to the text, in order, and the way back.

import { element, make, shorten } from "./elements.js";
import { named, undo } from "./erasing.js";
import { nats, seconds, tokens } from "./figures.js";
import { onChange, onOpen, session } from "./session.js";

// Receipts that were undone since the session was opened, with how many stood before them.
let undone = [];
let known = [];

function show() {
  const { receipts, undo_steps: steps } = session.view;
  const items = [item("Read", `${tokens(session.view.tokens)} as ${session.view.messages.length ? `${session.view.messages.length} messages` : "a document"}`,
    { back: receipts.length && steps >= receipts.length ? receipts.length : 0, current: !receipts.length })];
  receipts.forEach((receipt, place) => {
    const behind = receipts.length - 1 - place;
    const said = `${tokens(receipt.erased)} by ${named(receipt)} in ${seconds(receipt.seconds)}, ${receipt.exact ? "exact" : "approximate"}`;
    items.push(...undoneAt(place));
    items.push(item("Erased", said, {
      text: receipt.text.join(" … "), back: behind && steps >= behind ? behind : 0, current: !behind,
      audited: receipt.audit?.kl ?? null,
    }));
  });
  items.push(...undoneAt(receipts.length));
  element("timeline").replaceChildren(...items);
}

function undoneAt(place) {
  return undone.filter((one) => one.place === place).map(({ receipt }) =>
    item("Undone", `${tokens(receipt.erased)} by ${named(receipt)}`, { text: receipt.text.join(" … "), undone: true }));
}

function item(verb, said, { text = null, back = 0, current = false, undone: gone = false, audited = null } = {}) {
  const button = back ? make("button", { type: "button", "aria-label": `Back to: ${verb} ${said}` }, "Back to here") : null;
  if (button) {
    button.disabled = session.doing !== null;
    button.addEventListener("click", () => undo(back));
  }
  return make("li", { class: gone ? "undone" : "", "aria-current": current ? "step" : null },
    make("div", {}, make("strong", {}, verb), ` ${said}`, current ? make("span", { class: "now" }, " now") : null),
    text === null ? null : make("q", {}, shorten(text, 100)),
    audited === null ? null : make("div", { class: "legend" }, `audited: KL ${nats(audited)} nats per token`),
    button);
}

function remember() {
  const now = session.view.receipts;
  const same = (one, other) => JSON.stringify({ ...one, audit: null }) === JSON.stringify({ ...other, audit: null });
  let common = 0;
  while (common < Math.min(known.length, now.length) && same(known[common], now[common])) common += 1;
  undone = undone.filter((one) => one.place <= common);
  undone.push(...known.slice(common).map((receipt) => ({ receipt, place: common })));
  known = now;
}

onOpen(() => { undone = []; known = []; });
onChange(() => {
  if (!session.view) return;
  remember();
  show();
});
