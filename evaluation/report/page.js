"use strict";

// Texts come from benchmarked contexts and models: they enter the page as text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const ALL = "";
const KINDS = {
  influence: "feels the span", leak: "asks for erased text", no_harm: "untouched by the span",
};
const element = (id) => document.getElementById(id);
const suite = element("suite"), task = element("task"), method = element("method"), filter = element("filter");
const dialog = element("keys"), shown = element("case");
const searched = data.cases.map(searchText);
let matching = [], at = 0;

// What is shown

function searchText(one) {
  const answers = Object.values(one.methods).flatMap((measured) => measured.answers.map((answer) => answer.answer));
  const asked = one.questions.flatMap((question) => [question.question, question.expected]);
  return [one.id, one.before, ...one.erased, one.after, ...asked, ...answers].join("\n").toLowerCase();
}

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
}

function unique(values) { return [...new Set(values)]; }

function taskOptions() {
  const cases = data.cases.filter((one) => suite.value === ALL || one.suite === suite.value);
  const names = unique(cases.map((one) => JSON.stringify([one.suite, one.task])));
  const label = ([ofSuite, name]) => suite.value === ALL && suite.options.length > 2 ? `${ofSuite}: ${name}` : name;
  fill(task, [[ALL, "all tasks"], ...names.map((name) => [name, label(JSON.parse(name))])]);
}

function select(announced) {
  const words = filter.value.toLowerCase().trim();
  matching = data.cases.filter((one, index) =>
    (suite.value === ALL || one.suite === suite.value) &&
    (task.value === ALL || JSON.stringify([one.suite, one.task]) === task.value) &&
    searched[index].includes(words));
  at = 0;
  show(announced);
}

function show(announced) {
  const one = matching[at];
  element("position").textContent = one ? `Case ${at + 1} of ${matching.length}` : "No case";
  element("previous").disabled = at === 0;
  element("next").disabled = at + 1 >= matching.length;
  if (!one) {
    shown.replaceChildren(make("p", {}, data.cases.length ? "No case matches." : "The runs came without their cases."));
    announce(announced && "No case matches");
    return;
  }
  shown.dataset.id = one.id;
  shown.dataset.method = method.value;
  const measured = one.methods[method.value];
  shown.replaceChildren(facts(one), passage(one), ...one.questions.map((question, index) => asked(one, question, index)));
  const kls = measured ? one.questions.map((question, index) => perToken(measured.answers[index].kl, question)) : [];
  const spoken = measured ? `KL to exact ${kls.join(", ")}` : "not measured here";
  announce(announced && `Case ${at + 1} of ${matching.length}, ${one.suite} ${one.task}, method ${label()}: ${spoken}`);
}

function announce(text) { if (text) element("announcer").textContent = text; }

function label() { return method.selectedOptions[0] ? method.selectedOptions[0].textContent : "none"; }

// An adversary asks each cache in other words: its questions have no KL.
function perToken(kl, question) {
  return kl === null ? "not compared" : `${(kl / Math.max(1, question.tokens)).toFixed(4)} nats per token`;
}

function facts(one) {
  const measured = one.methods[method.value];
  const parts = [one.id, `${one.suite}: ${one.task}`, `${one.erased_tokens} of ${one.context_tokens} tokens erased`];
  if (one.distance_tokens !== null) parts.push(`${one.distance_tokens} tokens before the question`);
  if (one.depth !== null) parts.push(`depth ${one.depth}`);
  if (measured && measured.recomputed !== null) parts.push(`${label()} recomputed ${measured.recomputed} tokens`);
  return make("p", { class: "facts" }, `${parts.join(" · ")} · chosen: ${one.chosen}`);
}

function passage(one) {
  const block = make("p", { class: "passage", tabindex: "0", role: "region", "aria-label": "Context" }, one.before);
  one.erased.forEach((text, index) => {
    if (index) block.append(" … ");
    block.append(make("span", { class: "mark" }, "[erased: "), make("del", {}, text), make("span", { class: "mark" }, "]"));
  });
  block.append(one.after);
  return block;
}

function asked(one, question, index) {
  const kind = (question.adversarial ? "adversarial: " : "") + (KINDS[question.kind] || question.kind);
  const title = question.question === null ? "The text goes on" : question.question;
  const answers = (name) => one.methods[name] ? one.methods[name].answers[index] : null;
  const [unerased, edited, exact] = [data.unerased, method.value, data.exact].map(answers);
  const block = make("section", { class: "question" },
    make("p", {}, make("span", { class: "kind" }, kind), make("strong", {}, title)),
    make("p", { class: "facts" }, `forced answer: ${question.expected}`));
  block.append(make("div", { class: "answers" },
    answered("Not erased", unerased, exact, question, ""),
    answered(label(), edited, exact, question, "edited"),
    answered("Exact", exact, edited, question, "exact")));
  return block;
}

// Of the exact answer, `other` is the edited one: what is missing from that is marked.
function answered(name, answer, other, question, role) {
  const block = make("div", { class: `answer ${role}` }, make("h4", {}, name));
  if (!answer) {
    block.append(make("p", { class: "said none" }, "not measured"));
    return block;
  }
  if (answer.prompt) block.append(make("p", { class: "facts" }, `asked: ${answer.prompt}`));
  const said = make("p", { class: "said" });
  const footer = make("footer", {});
  block.append(said, footer);
  if (answer.answer === null) {
    said.className = "said none";
    said.append("no answer was generated; KL is on the forced one");
  } else if (!other || other.answer === null) {
    said.append(answer.answer);
  } else {
    const [pieces, differing] = marked(answer.answer, other.answer, role === "exact" ? "absent" : "extra");
    said.append(...pieces);
    const words = `${differing} ${differing === 1 ? "word" : "words"}`;
    if (role === "exact") footer.append(differing ? `${words} (dashed) missing from ${label()} · ` : "");
    else footer.append(answer.answer === other.answer ? "same as exact · " : `${words} (wavy) not in exact · `);
  }
  footer.append(role === "exact" ? "reference" : `KL ${perToken(answer.kl, question)}`);
  if (answer.correct !== null) footer.append(" · ", flag(answer.correct, "✓ correct", "✗ wrong"));
  if (answer.leaked !== null) footer.append(" · ", flag(!answer.leaked, "✓ not leaked", "⚠ leaked"));
  return block;
}

function flag(good, yes, no) { return make("span", { class: good ? "good" : "bad" }, good ? yes : no); }

// `text` as nodes, with the words marked that are not in a longest common subsequence with `other`.
function marked(text, other, how) {
  const pieces = text.match(/\s+|\S+/g) || [];
  const words = pieces.filter((piece) => piece.trim()), others = other.match(/\S+/g) || [];
  const common = Array.from({ length: words.length + 1 }, () => new Uint16Array(others.length + 1));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = others.length - 1; j >= 0; j--)
      common[i][j] = words[i] === others[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const kept = new Set();
  for (let i = 0, j = 0; i < words.length && j < others.length;) {
    if (words[i] === others[j]) { kept.add(i); i++; j++; }
    else if (common[i + 1][j] >= common[i][j + 1]) i++;
    else j++;
  }
  let word = 0;
  const nodes = pieces.map((piece) => {
    if (!piece.trim() || kept.has(word++)) return piece;
    return how === "extra" ? make("ins", {}, piece) : make("span", { class: "absent" }, piece);
  });
  return [nodes, words.length - kept.size];
}

// Moving about

function step(by) {
  const to = at + by;
  if (to < 0 || to >= matching.length) {
    announce(by < 0 ? "This is the first case" : "This is the last case");
    return;
  }
  at = to;
  show(true);
}

function cycle(choice, by) {
  if (!choice.options.length) return;
  choice.selectedIndex = (choice.selectedIndex + by + choice.options.length) % choice.options.length;
  choice.dispatchEvent(new Event("change"));
}

const KEYS = {
  j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
  m: () => cycle(method, 1), M: () => cycle(method, -1), t: () => cycle(task, 1), T: () => cycle(task, -1),
  "/": () => filter.focus(), "?": () => dialog.showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  if (event.target === filter && event.key === "Escape") { filter.blur(); return; }
  const target = event.target;
  const own = target instanceof Element && target.closest("input, select, textarea");
  // Arrows scroll what can be scrolled sideways.
  const scrolls = event.key.startsWith("Arrow") && target instanceof Element && target.closest(".scroll");
  if (own || scrolls || !Object.hasOwn(KEYS, event.key) || !element("single-keys").checked) return;
  event.preventDefault();
  KEYS[event.key]();
  const place = element("controls").getBoundingClientRect();
  if (event.key !== "?" && (place.top < 0 || place.bottom > window.innerHeight)) element("browser").scrollIntoView();
});

suite.addEventListener("change", () => { taskOptions(); select(true); });
task.addEventListener("change", () => select(true));
method.addEventListener("change", () => show(true));
filter.addEventListener("input", () => select(true));
element("previous").addEventListener("click", () => step(-1));
element("next").addEventListener("click", () => step(1));
element("show-keys").addEventListener("click", () => dialog.showModal());

fill(suite, [[ALL, "all suites"], ...unique(data.cases.map((one) => one.suite)).map((name) => [name, name])]);
fill(method, data.methods.map((one) => [one.name, one.label]));
taskOptions();
element("controls").hidden = data.cases.length === 0;
select(false);
