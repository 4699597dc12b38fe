// Everything is shown by the module that it belongs to; this one starts them.

import "./transcript.js";
import "./erasing.js";
import "./timeline.js";
import "./asking.js";
import "./auditing.js";
import { element, showError } from "./elements.js";
import { readMethods } from "./methods.js";
import { request, setKey, whenKeyIsMissing } from "./server.js";
import { start } from "./start.js";

async function begin() {
  const [model] = (await request("GET", "/v1/models")).data;
  element("model").textContent = `${model.id}${model.context_length ? ` · ${model.context_length.toLocaleString("en")} positions` : ""}`;
  element("key").hidden = true;
  await readMethods();
  await start();
}

function attempt() {
  begin().catch((error) => { if (error.status !== 401) showError("start-error", error); });
}

whenKeyIsMissing((error) => {
  const place = element("key");
  // The first refusal asks; a later one says what is wrong with the key.
  place.querySelector(".error").textContent = place.hidden ? "" : error.message;
  place.hidden = false;
  element("key-input").focus();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(element("key-input").value.trim());
  element("key-input").value = "";
  attempt();
});
attempt();
