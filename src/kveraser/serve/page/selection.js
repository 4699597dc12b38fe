// Which tokens are selected: a range of them, of which the erased ones don't count.

import { announce, shorten } from "./elements.js";
import { tokens as counted } from "./figures.js";
import { onChange, onOpen, session } from "./session.js";

const SPEAK_AFTER = 400;

const NOTHING = { anchor: null, active: null };
let range = NOTHING;
let speaking = 0;
const listeners = [];

export function onSelect(act) { listeners.push(act); }

// The token that the keyboard stands on; null before it was used.
export const active = () => range.active;

// First and last selected token, live ones both; null where nothing is selected.
export function selected() {
  if (range.anchor === null) return null;
  let [first, last] = [Math.min(range.anchor, range.active), Math.max(range.anchor, range.active)];
  while (first <= last && !erasable(first)) first += 1;
  while (last >= first && !erasable(last)) last -= 1;
  return first <= last ? [first, last] : null;
}

// What a template puts in front of everything belongs to no span.
export const erasable = (place) => session.tokens[place].live && session.tokens[place].start >= 0;

export const isSelected = (place, bounds = selected()) =>
  bounds !== null && bounds[0] <= place && place <= bounds[1] && erasable(place);

export function select(anchor, active) {
  if (range.anchor === anchor && range.active === active) return;
  range = { anchor, active };
  for (const act of listeners) act();
  clearTimeout(speaking);
  speaking = setTimeout(() => announce(described()), SPEAK_AFTER);
}

// Moves the keyboard's place; `extending` the selection to there, or selecting nothing.
export function move(place, extending) {
  select(extending ? range.anchor ?? range.active ?? place : null, place);
}

export function clear() { select(null, range.active); }

export function selectMessage(index) {
  const inside = session.tokens.flatMap((token, place) => token.message === index ? [place] : []);
  select(inside[0], inside.at(-1));
}

// The tokens that touch characters of the page's own joined text.
export function selectCharacters(start, end) {
  let at = 0, first = null, last = null;
  session.tokens.forEach((token, place) => {
    const next = at + token.text.length;
    if (next > start && at < end) { first ??= place; last = place; }
    at = next;
  });
  if (first !== null) select(first, last);
}

export const selectedText = ([first, last]) =>
  session.tokens.slice(first, last + 1).filter((token) => token.live).map((token) => token.text).join("");

export const count = ([first, last]) => session.tokens.slice(first, last + 1).filter((token) => token.live).length;

function described() {
  const bounds = selected();
  return bounds ? `${counted(count(bounds))} selected: ${shorten(selectedText(bounds))}` : "Nothing selected";
}

onOpen(() => { range = NOTHING; });
onChange((contents) => {
  if (!contents) return;
  // What was selected is gone, or stands where it stood: indices of tokens never change.
  if (range.active !== null && range.active >= session.tokens.length) range = NOTHING;
  else range = { ...range, anchor: null };
  clearTimeout(speaking);
  for (const act of listeners) act();
});
