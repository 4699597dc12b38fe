// Where the text comes from: an example, or what the user pastes.

import { announce, element, make, showError } from "./elements.js";
import { tokens } from "./figures.js";
import { conversationIn } from "./pasted.js";
import { request } from "./server.js";
import { during, onChange, open, session } from "./session.js";

// Long enough to come back to, short enough that forgotten ones go.
const UNUSED_SECONDS = 6 * 3600;

let examples = [];

export async function start() {
  examples = await request("GET", "/page/examples.json");
  element("examples").replaceChildren(...examples.map((example) => {
    const button = make("button", { type: "button", class: "example", "data-name": example.name },
      make("span", { class: "kind" }, example.messages ? "conversation" : "document"), make("strong", {}, example.title));
    button.addEventListener("click", () => read(contentsOf(example), example));
    return button;
  }));
  const id = new URL(location.href).searchParams.get("session");
  if (id) await attempt(() => open(id, null));
}

function contentsOf(example) {
  if (!example.messages) return { text: example.context };
  return { messages: example.messages, ...(example.tools ? { tools: example.tools } : {}) };
}

async function read(contents, example) {
  await attempt(() => during("reading", async () => {
    element("start-doing").textContent = "The model reads the text …";
    const made = await request("POST", "/v1/sessions", { ...contents, ttl: UNUSED_SECONDS });
    await open(made.id, example);
    element("own").open = false;
    announce(`Read ${tokens(made.tokens)}`);
  }));
  if (session.view && !element("start-error").textContent) element("reading").focus();
}

async function attempt(work) {
  showError("start-error", null);
  try {
    await work();
  } catch (error) {
    showError("start-error", error);
  } finally {
    element("start-doing").textContent = "";
  }
}

element("own-text").addEventListener("input", () => {
  const found = conversationIn(element("own-text").value);
  const [conversation, text] = element("own-form").elements.kind;
  conversation.checked = found !== null;
  text.checked = found === null;
  element("own-kind").textContent = found ? `${found.messages.length} messages found` : "";
});

element("own-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("own-text").value;
  if (element("own-form").elements.kind.value === "document") {
    read({ text }, null);
    return;
  }
  const found = conversationIn(text);
  if (found) read(found, null);
  else showError("start-error", { message: "No messages found: begin lines with User: and Assistant:, or paste a JSON list of messages." });
});

onChange(() => {
  element("work").hidden = session.view === null;
  for (const button of document.querySelectorAll("#start button")) {
    button.disabled = session.doing !== null;
    if (button.dataset.name) button.setAttribute("aria-pressed", String(session.example?.name === button.dataset.name));
  }
  element("story").textContent = session.example?.story ?? "";
});
