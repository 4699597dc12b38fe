// How long each cache took until its first token, the erase included, as bars and numbers.

import { make } from "./elements.js";
import { seconds } from "./figures.js";

// `rows`: label, seconds of the erase, seconds to the first token, and a note.
export function times(rows) {
  const longest = Math.max(...rows.map((row) => row.erase + row.first), 1e-6);
  const erased = rows.some((row) => row.erase > 0);
  return make("table", { class: "times" },
    make("caption", {}, "Time to the first token", erased ? make("span", { class: "legend" }, " – ",
      make("span", { class: "swatch erase" }), " erase ", make("span", { class: "swatch first" }), " question and first token") : null),
    make("tbody", {}, ...rows.map((row) => make("tr", {},
      make("th", { scope: "row" }, row.label),
      make("td", { class: "figure" }, seconds(row.erase + row.first)),
      make("td", { class: "track", "aria-hidden": "true" }, part("erase", row.erase / longest), part("first", row.first / longest)),
      make("td", { class: "note" }, row.erase ? `${seconds(row.erase)} of it the erase; ${row.note}` : row.note)))));
}

function part(kind, share) {
  const node = make("span", { class: `part ${kind}` });
  node.style.setProperty("--share", share);
  return node;
}
