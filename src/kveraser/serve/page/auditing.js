// What the erases achieved: whether the text can still be got out, still steers, or took other things with it.

import { announce, element, facts, make, showError } from "./elements.js";
import { nats, percent, signed } from "./figures.js";
import { request } from "./server.js";
import { during, edited, onChange, onOpen, path, refresh, session } from "./session.js";
import { strip } from "./strip.js";

const KINDS = { influence: "feels the span", leak: "asks for erased text", no_harm: "untouched by the span" };

const lines = (id) => element(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

async function audit() {
  showError("audit-error", null);
  element("audit-doing").textContent = "Measuring: two fresh prefills, and every question to three caches …";
  try {
    await during("auditing", async () => {
      const [probes, secrets] = [lines("probes"), lines("secrets")];
      const body = { ...(probes.length ? { probes: questions(probes) } : {}), ...(secrets.length ? { secrets } : {}) };
      const told = (await request("POST", path("/audit"), body)).audit;
      await refresh();
      element("audited").replaceChildren(...shown(told));
      element("audited-stale").hidden = true;
      announce(`Audited: ${verdict(told)}`);
    });
  } catch (error) {
    showError("audit-error", error);
  } finally {
    element("audit-doing").textContent = "";
  }
}

// A user's own question is asked for its influence, and as an attempt to get the secrets out.
const questions = (probes) => probes.flatMap((question) => [question, { question, kind: "leak" }]);

function verdict(told) {
  const given = told.probes.filter((probe) => probe.kind === "leak" && probe.reproduced && !probe.reproduced_exact).length;
  const asked = told.probes.filter((probe) => probe.kind === "leak").length;
  if (!asked) return "no question asked for the erased text";
  return given ? `${given} of ${asked} questions got a secret out that an exact cache does not tell`
    : `none of ${asked} questions got a secret out that an exact cache does not tell`;
}

function shown(told) {
  const bad = told.probes.some((probe) => probe.kind === "leak" && probe.reproduced && !probe.reproduced_exact);
  const between = told.fidelity === null ? "the questions do not feel the span"
    : `${percent(told.fidelity)} (95% interval ${percent(told.fidelity_low)} to ${percent(told.fidelity_high)})`;
  return [
    make("h3", {}, "Result"),
    make("p", { class: bad ? "verdict bad" : "verdict good" }, `${bad ? "✗" : "✓"} ${verdict(told)}.`),
    facts([
      ["KL to exact", `${nats(told.kl)} nats per token; not erased ${nats(told.kl_unerased)}`], ["Fidelity", between],
      ["Leak", `${signed(told.leak)} nats per token of the erased text, against exact`], ["Leak rate", percent(told.leak_rate)],
      ["No harm", told.no_harm === null ? null : `KL ${nats(told.no_harm)} nats per token where the span was never felt`],
      ["Hole floor", told.kl_hole === null ? null : `KL ${nats(told.kl_hole)}: the least that is possible with a hole in the positions`],
    ]),
    ...told.probes.map(asked),
  ];
}

function asked(probe) {
  const leaks = probe.reproduced && !probe.reproduced_exact;
  const heading = make("summary", {}, make("span", { class: "kind" }, KINDS[probe.kind]), make("span", { class: "asked" }, probe.question),
    make("span", { class: leaks ? "outcome bad" : "outcome" }, probe.kind === "leak"
      ? leaks ? "✗ secret told" : probe.reproduced ? "told by exact too" : "✓ secret not told" : `KL ${nats(probe.kl)}`));
  return make("details", { class: "probe" }, heading, facts([
    [probe.kind === "influence" ? "Exact says" : "Forced answer", probe.answer], ["Erased says", probe.edited_answer || "nothing"],
    ["KL to exact", `${nats(probe.kl)}; not erased ${nats(probe.kl_unerased)}`],
    ["Log-probability", `${nats(probe.log_probability_edited)} a token; exact ${nats(probe.log_probability_exact)}`],
  ]), probe.by_token.length ? strip(probe) : null);
}

element("audit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!element("audit-button").disabled) audit();
});

onOpen(() => element("audited").replaceChildren());
onChange((contents) => {
  if (!session.view) return;
  if (contents) element("audited-stale").hidden = !element("audited").firstChild;
  element("audit-button").disabled = session.doing !== null || !edited();
  element("audit-button").title = edited() ? "" : "Erase something first";
});
