// Numbers as this page writes them.

export function seconds(value) {
  if (value < 0.001) return "under 1 ms";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let place = 0;
  while (value >= 1024 && place + 1 < units.length) { value /= 1024; place += 1; }
  return `${place && value < 10 ? value.toFixed(1) : Math.round(value)} ${units[place]}`;
}

// KL and log-probabilities: small ones are told by their size.
export function nats(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size < 5e-5) return "0.0000";
  return size < 1 ? value.toFixed(4) : value.toFixed(2);
}

export const signed = (value) => value === null ? "–" : `${value > 0 ? "+" : ""}${nats(value)}`;

export const percent = (value) => value === null ? "–" : `${(100 * value).toFixed(1)}%`;

export const tokens = (count) => `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;
