// How this page makes elements, speaks to screen readers and shows errors. Text enters as text nodes only.

export const element = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Name and value, as a definition list; pairs without a value are left out.
export function facts(pairs) {
  return make("dl", {}, ...pairs.filter(([, value]) => value !== null)
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

export function announce(text) {
  const place = element("announcer");
  // The same words twice are announced twice only when they change in between.
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}

export function showError(id, error) {
  element(id).textContent = error === null ? "" : error.message;
}

export const shorten = (text, most = 80) =>
  text.length <= most ? text : `${text.slice(0, most / 2)} … ${text.slice(-most / 2)}`;
