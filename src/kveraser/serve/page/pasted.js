// From a pasted text to messages: JSON in the OpenAI format, or lines that begin with a role.

const ROLES = ["system", "user", "assistant", "tool"];
const LINE = new RegExp(`^\\s*(${ROLES.join("|")})\\s*:\\s?`, "i");

// The messages and tools in a text; null where it is none of these forms.
export function conversationIn(text) {
  const read = fromJson(text);
  if (read) return read;
  const messages = [];
  for (const line of text.trim().split("\n")) {
    const found = line.match(LINE);
    if (found) messages.push({ role: found[1].toLowerCase(), content: line.slice(found[0].length) });
    else if (messages.length) messages.at(-1).content += `\n${line}`;
    else return null;
  }
  if (messages.length < 2) return null;
  return { messages: messages.map(({ role, content }) => ({ role, content: content.trim() })) };
}

function fromJson(text) {
  let read;
  try { read = JSON.parse(text); } catch { return null; }
  const messages = Array.isArray(read) ? read : read?.messages;
  if (!Array.isArray(messages) || !messages.length || !messages.every((one) => one && typeof one.role === "string")) return null;
  return Array.isArray(read?.tools) ? { messages, tools: read.tools } : { messages };
}
