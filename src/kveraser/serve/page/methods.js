// The method to erase by, with its numbers, as the server's methods take them.

import { element, make } from "./elements.js";
import { request } from "./server.js";

const BUDGET = 0.02;
const NAMES = { window: "window, in tokens", per_span: "more for each erased token", max_kl: "budget, nats per token" };

let methods = [];

export async function readMethods() {
  methods = (await request("GET", "/v1/methods")).data;
  const own = methods.find((method) => method.default);
  const options = methods.map((method) => [method.name, method === own ? `${method.name} (the server's choice)` : method.name]);
  options.push(["auto", own ? "auto" : "auto (the server's choice)"]);
  element("method").replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
  element("method").value = own ? own.name : "auto";
  show();
}

function show() {
  const name = element("method").value;
  const method = methods.find((one) => one.name === name);
  const summary = element("method-summary");
  if (!method) summary.replaceChildren("the cheapest method whose audit stays within the budget; in the end recompute");
  else summary.replaceChildren(`${method.summary}. Costs ${method.cost}.`,
    method.removes_text ? "" : make("strong", { class: "bad" }, " The text stays in the cache."));
  const numbers = method ? Object.entries(method.parameters) : [["max_kl", BUDGET]];
  element("parameters").replaceChildren(...numbers.map(([parameter, value]) =>
    make("label", { class: "field" }, NAMES[parameter] ?? parameter.replaceAll("_", " "),
      make("input", { type: "number", min: "0", step: "any", name: parameter, value, placeholder: "its own" }))));
}

// The request's fields.
export function chosenMethod() {
  const name = element("method").value;
  const given = [...element("parameters").querySelectorAll("input")].filter((input) => input.value !== "");
  if (name === "auto") return { method: name, max_kl: given.length ? given[0].valueAsNumber : BUDGET };
  return { method: given.length ? `${name}(${given.map((input) => `${input.name}=${input.value}`).join(", ")})` : name };
}

element("method").addEventListener("change", show);
