// One question to three caches: as if nothing had been erased, as it was erased, and as if it had never been read.

import { announce, element, make, showError } from "./elements.js";
import { seconds, tokens } from "./figures.js";
import { request, stream } from "./server.js";
import { during, edited, onChange, onOpen, path, refresh, session } from "./session.js";
import { strip } from "./strip.js";
import { times } from "./times.js";

const CACHES = [["unerased", "Not erased"], ["edited", "Erased"], ["exact", "Exact"]];
const LABELS = Object.fromEntries(CACHES);
// Each begins when the one before it has its first token, so that none waits for another's prefill.
const ORDER = ["edited", "exact", "unerased"];

let stopping = null;

async function ask(question) {
  showError("ask-error", null);
  for (const id of ["times", "distance"]) element(id).replaceChildren();
  element("answers-stale").hidden = true;
  const comparing = edited();
  const asked = comparing ? ORDER : ["edited"];
  const answers = Object.fromEntries(CACHES.map(([name]) => [name, answer(name, comparing, asked.includes(name))]));
  element("answers").replaceChildren(...CACHES.map(([name]) => answers[name].node));
  stopping = new AbortController();
  try {
    await during("answering", async () => {
      const whole = [];
      for (const name of asked) {
        const { first, end } = answers[name].run(question, stopping.signal);
        whole.push(end);
        await first;
      }
      await Promise.all(whole);
    });
    showTimes(asked.map((name) => answers[name]), comparing);
    announce(asked.map((name) => `${answers[name].label}: ${answers[name].text()}`).join(". "));
    if (comparing) await measure(question);
  } catch (error) {
    if (stopping.signal.aborted) announce("Stopped");
    else showError("ask-error", error);
  } finally {
    // What the others were still saying is of no use alone.
    stopping.abort();
    stopping = null;
  }
}

function answer(name, comparing, isAsked) {
  const label = name === "edited" && !comparing ? "The cache as it is" : LABELS[name];
  const said = make("p", { class: "said", tabindex: "-1" }), footer = make("footer", {});
  const node = make("article", { class: `answer ${name}`, "aria-label": `${label}: answer` }, make("h3", {}, label), said, footer);
  if (!isAsked) {
    said.append(make("span", { class: "none" }, "The same, as long as nothing is erased."));
    node.classList.add("idle");
  }
  const told = { erase: 0, first: 0, prompt: 0, cached: 0 };
  const run = (question, signal) => {
    const began = performance.now();
    node.setAttribute("aria-busy", "true");
    footer.textContent = "waiting for the first token …";
    let begin;
    const first = new Promise((resolve) => { begin = resolve; });
    const begun = () => {
      if (told.first) return;
      told.first = (performance.now() - began) / 1000;
      footer.textContent = `first token after ${seconds(told.first)}`;
      begin();
    };
    const body = { question, caches: name, max_tokens: element("most").valueAsNumber };
    const end = stream(path("/ask"), body, signal, (event) => {
      if (event.object === "answer.delta") {
        if (event.text) begun();
        said.append(event.text);
      } else if (event.object === "answer.finished") {
        begun();
        Object.assign(told, { prompt: event.usage.prompt_tokens, cached: event.usage.prompt_tokens_details.cached_tokens });
        if (!said.textContent.trim()) said.append(make("span", { class: "none" }, "Nothing: the answer is empty."));
        footer.textContent = `${tokens(event.usage.completion_tokens)}${event.finish_reason === "length" ? ", cut off" : ""} · ${seconds((performance.now() - began) / 1000)}`;
      }
    }).finally(() => { node.setAttribute("aria-busy", "false"); begin(); });
    // Awaited together with the others; until then a failure is nobody's surprise.
    end.catch(() => {});
    return { first, end };
  };
  return { node, run, told, label, name, text: () => said.textContent };
}

function showTimes(answers, comparing) {
  const spent = session.view.receipts.reduce((sum, receipt) => sum + receipt.seconds, 0);
  const rows = CACHES.flatMap(([name]) => answers.filter((one) => one.name === name)).map(({ name, label, told }) => ({
    label, first: told.first, erase: name === "edited" && comparing ? spent : 0,
    note: told.cached ? `${tokens(told.prompt - told.cached)} run, ${told.cached.toLocaleString("en")} from the cache` : `${tokens(told.prompt)} run, none from a cache`,
  }));
  element("times").replaceChildren(times(rows));
}

// The question as an audit: how far the erased cache is from exact at every token of the exact answer.
async function measure(question) {
  const place = element("distance");
  place.replaceChildren(make("p", { class: "doing", role: "status" }, "Measuring the distance to exact …"));
  try {
    await during("auditing", async () => {
      const { audit } = await request("POST", path("/audit"), { probes: [question] });
      await refresh();
      const [probe] = audit.probes;
      place.replaceChildren(make("h3", {}, "Distance to exact, token by token"),
        make("p", { class: "legend" }, `On the exact answer, at most its first 32 tokens. KL is ${probe.kl < probe.kl_unerased
          ? `${(100 * (1 - probe.kl / probe.kl_unerased)).toFixed(1)}% smaller than without erasing` : "not smaller than without erasing"}.`),
        strip(probe));
    });
  } catch (error) {
    place.replaceChildren(make("p", { class: "error", role: "alert" }, error.message));
  }
}

function suggestions() {
  const { questions = [], unrelated = [] } = session.example ?? {};
  element("suggestions").replaceChildren(...[...questions, ...unrelated].map(({ question }) => {
    const button = make("button", { type: "button", class: "chip" }, question);
    button.addEventListener("click", () => {
      element("question").value = question;
      element("ask-form").requestSubmit();
    });
    return button;
  }));
}

element("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (question && session.doing === null) ask(question);
});
element("stop").addEventListener("click", () => stopping?.abort());

onOpen(() => {
  suggestions();
  for (const id of ["answers", "times", "distance"]) element(id).replaceChildren();
  element("question").value = "";
});
onChange((contents) => {
  if (!session.view) return;
  if (contents) element("answers-stale").hidden = !element("answers").firstChild;
  element("ask-button").disabled = session.doing !== null;
  element("stop").disabled = session.doing !== "answering";
  for (const button of document.querySelectorAll("#suggestions button")) button.disabled = session.doing !== null;
});
