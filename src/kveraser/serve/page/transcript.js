// The text as messages and tokens: shown, and selected from with mouse, touch or keyboard.

import { element, make, showError } from "./elements.js";
import { clear, active, erasable, isSelected, move, onSelect, select, selectCharacters, selected, selectMessage } from "./selection.js";
import { onChange, onOpen, session } from "./session.js";

const transcript = element("transcript");
let nodes = [];
let found = -1;

// Showing

function show() {
  const groups = [];
  session.tokens.forEach((token, place) => {
    const of = token.message ?? (token.start < 0 ? "template" : "text");
    if (groups.at(-1)?.of !== of) groups.push({ of, places: [] });
    groups.at(-1).places.push(place);
  });
  nodes = session.tokens.map((token, place) => tokenNode(token, place));
  transcript.replaceChildren(...groups.map(shownGroup));
  markErased();
  mark();
}

function tokenNode(token, place) {
  const node = make("span", { role: "option", id: `token-${place}`, "aria-selected": "false", "data-place": place }, token.text);
  if (!token.content) node.classList.add("template");
  if (!token.live) {
    node.classList.add("erased");
    node.setAttribute("aria-disabled", "true");
  }
  const said = spoken(token.text);
  if (said !== token.text || !token.live) node.setAttribute("aria-label", token.live ? said : `${said}, erased`);
  return node;
}

function spoken(text) {
  if (text === "") return "rest of a character";
  if (text.trim()) return text;
  return text.includes("\n") ? "line break" : "space";
}

function shownGroup({ of, places }) {
  const own = places.map((place) => nodes[place]);
  if (of === "template") return make("p", { class: "opening template", "aria-hidden": "true" }, ...own.map((node) => node.textContent));
  const message = session.view.messages[of];
  const name = message ? `${message.role}, message ${of + 1}` : "document";
  // A message that says nothing, a tool call say, is shown as the template writes it.
  const silent = places.every((place) => !session.tokens[place].content);
  const list = make("div", {
    role: "listbox", tabindex: "0", class: silent ? "tokens silent" : "tokens",
    "aria-multiselectable": "true", "aria-label": `Tokens of ${name}`,
  }, ...own);
  const gone = places.every((place) => !session.tokens[place].live);
  const heading = make("h3", {}, make("span", { class: "role" }, message?.role ?? "document"), gone ? " erased" : null);
  const whole = make("button", { type: "button", "aria-label": `Select ${name}`, "data-message": of }, "Select message");
  whole.disabled = gone;
  whole.addEventListener("click", () => selectMessage(of));
  return make("section", { class: `message${gone ? " gone" : ""}`, "data-role": message?.role ?? "document", "aria-label": name },
    make("div", { class: "title" }, heading, message ? whole : null), list);
}

// Each run of erased tokens is counted at its first one, for when they are hidden.
function markErased() {
  nodes.forEach((node, place) => {
    if (session.tokens[place].live) return;
    const first = node.previousElementSibling;
    if (first?.classList.contains("erased")) return;
    let count = 0;
    for (let next = node; next?.classList.contains("erased"); next = next.nextElementSibling) count += 1;
    node.classList.add("first");
    node.dataset.erased = `[${count} erased]`;
  });
}

function mark() {
  const bounds = selected();
  nodes.forEach((node, place) => {
    const chosen = isSelected(place, bounds);
    if ((node.getAttribute("aria-selected") === "true") !== chosen) node.setAttribute("aria-selected", String(chosen));
    node.classList.toggle("active", place === active());
  });
  for (const list of transcript.querySelectorAll("[role=listbox]")) {
    const inside = active() !== null && list.contains(nodes[active()]);
    if (inside) list.setAttribute("aria-activedescendant", nodes[active()].id);
    else list.removeAttribute("aria-activedescendant");
  }
}

// Keyboard

const visible = (place) => nodes[place]?.closest("[role=listbox]") && nodes[place].getClientRects().length > 0;

function next(place, by) {
  let to = place + by;
  while (to >= 0 && to < nodes.length && !visible(to)) to += by;
  return to >= 0 && to < nodes.length ? to : place;
}

// The nearest token of the line above or below.
function vertical(place, by) {
  const from = nodes[place].getClientRects()[0];
  let line = null, nearest = place, least = Infinity;
  for (let to = next(place, by), last = place; to !== last; last = to, to = next(to, by)) {
    const box = nodes[to].getClientRects()[0];
    const other = by > 0 ? box.top >= from.bottom - 2 : box.bottom <= from.top + 2;
    if (!other) continue;
    if (line !== null && Math.abs(box.top - line) > 4) break;
    line ??= box.top;
    const distance = Math.abs(box.left - from.left);
    if (distance < least) { least = distance; nearest = to; }
  }
  return nearest;
}

function firstOf(list) {
  return Number([...list.children].find((node) => visible(Number(node.dataset.place)))?.dataset.place ?? -1);
}

function lastOf(list) {
  return Number([...list.children].findLast((node) => visible(Number(node.dataset.place)))?.dataset.place ?? -1);
}

function go(place, extending) {
  getSelection().removeAllRanges();
  move(place, extending);
  const list = nodes[place].closest("[role=listbox]");
  list.focus({ preventScroll: true });
  nodes[place].scrollIntoView({ block: "nearest" });
}

transcript.addEventListener("focusin", (event) => {
  const list = event.target;
  if (list.getAttribute("role") !== "listbox") return;
  if (active() !== null && list.contains(nodes[active()])) return;
  if (selected() === null && firstOf(list) >= 0) move(firstOf(list), false);
});

transcript.addEventListener("keydown", (event) => {
  const list = event.target;
  if (list.getAttribute("role") !== "listbox" || event.altKey) return;
  const at = active() !== null && visible(active()) && list.contains(nodes[active()]) ? active() : firstOf(list);
  if (at < 0) return;
  const control = event.ctrlKey || event.metaKey;
  const keys = {
    ArrowRight: () => go(next(at, 1), event.shiftKey), ArrowLeft: () => go(next(at, -1), event.shiftKey),
    ArrowDown: () => go(vertical(at, 1), event.shiftKey), ArrowUp: () => go(vertical(at, -1), event.shiftKey),
    Home: () => go(firstOf(list), event.shiftKey), End: () => go(lastOf(list), event.shiftKey),
    " ": () => { getSelection().removeAllRanges(); select(at, at); },
    Enter: () => element("erase-button").focus(),
    Escape: () => { getSelection().removeAllRanges(); clear(); },
  };
  const whole = () => { getSelection().removeAllRanges(); select(firstOf(list), lastOf(list)); };
  const act = control ? { a: whole }[event.key] : keys[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// Mouse and touch: what the browser selects, in whole tokens

const optionOf = (node) => (node.nodeType === Node.TEXT_NODE ? node.parentElement : node)?.closest?.("[role=option]") ?? null;

function placesIn(selection) {
  const bounds = selection.getRangeAt(0);
  const [first, last] = [optionOf(bounds.startContainer), optionOf(bounds.endContainer)];
  if (!first || !last) {
    const inside = nodes.flatMap((node, place) => visible(place) && bounds.intersectsNode(node) ? [place] : []);
    return inside.length ? [inside[0], inside.at(-1)] : null;
  }
  let [start, end] = [Number(first.dataset.place), Number(last.dataset.place)];
  if (bounds.startContainer.nodeType === Node.TEXT_NODE && bounds.startOffset === bounds.startContainer.length) start = next(start, 1);
  if (bounds.endOffset === 0) end = next(end, -1);
  return start <= end ? [start, end] : null;
}

document.addEventListener("selectionchange", () => {
  const selection = getSelection();
  if (selection.isCollapsed || !session.view) return;
  if (!transcript.contains(selection.anchorNode) || !transcript.contains(selection.focusNode)) return;
  const places = placesIn(selection);
  if (!places) return;
  const anchor = optionOf(selection.anchorNode);
  const backwards = anchor && Number(anchor.dataset.place) >= places[1] && places[0] !== places[1];
  select(...(backwards ? places.toReversed() : places));
});

transcript.addEventListener("click", (event) => {
  const node = event.target.closest("[role=option]");
  if (!node || !getSelection().isCollapsed) return;
  const place = Number(node.dataset.place);
  const bounds = selected();
  if (event.shiftKey) { move(place, true); return; }
  if (!erasable(place) || (bounds?.[0] === place && bounds[1] === place)) move(place, false);
  else select(place, place);
});

// Finding

element("find").addEventListener("submit", (event) => {
  event.preventDefault();
  showError("find-error", null);
  const wanted = element("find-text").value;
  if (!wanted) return;
  const text = session.tokens.map((token) => token.text).join("").toLowerCase();
  const live = session.tokens.flatMap((token) => Array(token.text.length).fill(token.live && token.start >= 0));
  // From behind the last one on, and around.
  const places = [];
  for (let place = text.indexOf(wanted.toLowerCase()); place >= 0; place = text.indexOf(wanted.toLowerCase(), place + 1)) {
    if (live.slice(place, place + wanted.length).every(Boolean)) places.push(place);
  }
  if (!places.length) {
    showError("find-error", { message: `“${wanted}” is not in the text that is left.` });
    return;
  }
  found = places.find((place) => place > found) ?? places[0];
  getSelection().removeAllRanges();
  selectCharacters(found, found + wanted.length);
  nodes[selected()[0]].scrollIntoView({ block: "nearest" });
});

for (const choice of document.querySelectorAll("input[name=shown]")) {
  choice.addEventListener("change", () => transcript.classList.toggle("as-tokens", choice.value === "tokens" && choice.checked));
}
element("show-erased").addEventListener("change", (event) => transcript.classList.toggle("without-erased", !event.target.checked));

onSelect(mark);
onOpen(() => { found = -1; transcript.scrollTop = 0; });
onChange((contents) => { if (contents) show(); });
