// KL per answer token, as a strip of bars and as a table.

import { make } from "./elements.js";
import { nats } from "./figures.js";

// `erased`: how the erased cache is named. Heights go with the square root, so that small differences show.
export function strip(probe) {
  const tokens = probe.by_token;
  const highest = Math.max(...tokens.flatMap((token) => [token.kl, token.kl_unerased]), 1e-3);
  const worst = tokens.reduce((one, other) => other.kl > one.kl ? other : one);
  const bars = make("div", {
    class: "strip", role: "img",
    "aria-label": `KL to exact of ${tokens.length} answer tokens, in nats: erased ${nats(probe.kl)} a token, not erased ` +
      `${nats(probe.kl_unerased)}. The erased cache is furthest at “${worst.text.trim()}”, ${nats(worst.kl)}. The table has all values.`,
  }, ...tokens.map((token) => cell(token, highest)));
  return make("div", { class: "strip-block" }, key(highest), bars, table(tokens));
}

function cell(token, highest) {
  const bar = (kind, value) => {
    const node = make("span", { class: `bar ${kind}` });
    node.style.setProperty("--height", Math.sqrt(Math.max(0, value) / highest));
    return node;
  };
  return make("span", { class: "cell", title: `${token.text}: erased ${nats(token.kl)}, not erased ${nats(token.kl_unerased)}` },
    make("span", { class: "bars" }, bar("unerased", token.kl_unerased), bar("edited", token.kl)),
    make("span", { class: "token" }, token.text.replaceAll("\n", "↵") || "·"));
}

function key(highest) {
  return make("p", { class: "legend" }, make("span", { class: "swatch unerased" }), " not erased  ",
    make("span", { class: "swatch edited" }), ` erased. A full bar is ${nats(highest)} nats; heights go with the square root.`);
}

function table(tokens) {
  const row = (token) => make("tr", {}, make("th", { scope: "row" }, token.text || "·"),
    make("td", {}, nats(token.kl_unerased)), make("td", {}, nats(token.kl)));
  return make("details", {}, make("summary", {}, "The values as a table"),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "KL of each answer token" },
      make("table", {}, make("caption", {}, "KL(exact ‖ cache) where each token of the exact answer is predicted, in nats"),
        make("thead", {}, make("tr", {}, ...["Token", "Not erased", "Erased"].map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...tokens.map(row)))));
}
