"use strict";
// Chat page of serve.py. Talks to /v1/chat/completions (streamed) and /sparsity; no build step, no other host.

const $ = (id) => document.getElementById(id);
const state = { messages: [], plans: [0], controller: null };

function plan() { return state.plans[Number($("sparsity").value)] ?? 0; }

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

// fetch with the API key, asked for once if the server wants one.
async function call(path, options = {}) {
  const saved = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(saved ? { Authorization: `Bearer ${saved}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status !== 401) return answer;
  const given = prompt("This server wants an API key:");
  if (!given) return answer;
  sessionStorage.setItem("key", given);
  return call(path, options);
}

async function setUp() {
  const models = await (await call("/v1/models")).json();
  $("model").textContent = models.data[0].id;
  document.title = `${models.data[0].id} · TEAL chat`;
  const found = await (await call("/sparsity")).json();
  state.plans = found.plans.length ? found.plans : [0];
  $("sparsity").max = state.plans.length - 1;
  $("sparsity").value = Math.max(0, state.plans.indexOf(found.own));
  showSparsity();
  showMap(found.achieved);
}

function showSparsity() {
  const text = `${Math.round(100 * plan())}%`;
  $("sparsity-value").textContent = text;
  $("sparsity").setAttribute("aria-valuetext", text);
}

// One streamed answer into node; returns its text. Figures are refreshed with every piece.
async function answerInto(node, figures, sparsity, count) {
  const start = performance.now();
  let text = "", first = 0, tokens = 0;
  const body = {
    messages: state.messages, stream: true, stream_options: { include_usage: true }, sparsity,
    temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value), seed: 0,
    count_sparsity: count,
  };
  const answer = await call("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    signal: state.controller.signal,
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) tokens = chunk.usage.completion_tokens;
      const piece = chunk.choices[0]?.delta?.content ?? "";
      if (piece) {
        first ||= performance.now();
        if (!chunk.usage) tokens += 1;
        text += piece;
        node.textContent = text;
        $("conversation").scrollTop = $("conversation").scrollHeight;
      }
    }
    const seconds = (performance.now() - first) / 1000;
    const rate = first && tokens > 1 ? `${((tokens - 1) / Math.max(seconds, 1e-3)).toFixed(1)} tok/s` : "…";
    const wait = first ? `first token ${((first - start) / 1000).toFixed(2)} s` : "";
    figures.textContent = `${Math.round(100 * sparsity)}% sparse · ${tokens} tokens · ${rate} · ${wait}`;
  }
  return text;
}

// Marks where the second text departs from the first.
function markDifference(expected, node) {
  const text = node.textContent;
  let i = 0;
  while (i < text.length && text[i] === expected[i]) i += 1;
  if (i === text.length) return;
  node.textContent = text.slice(0, i);
  node.append(element("span", "differs", text.slice(i)));
}

async function ask(event) {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || state.controller) return;
  $("message").value = "";
  state.messages.push({ role: "user", content: message });
  state.controller = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("status").textContent = "Answering…";
  const turn = element("div", "turn");
  const columns = element("div", "columns");
  turn.append(element("p", "user", message), columns);
  $("conversation").append(turn);
  const sparsities = $("compare").checked && plan() > 0 ? [0, plan()] : [plan()];
  const texts = [];
  try {
    for (const sparsity of sparsities) {
      const column = element("div", "");
      const node = element("div", "answer"), figures = element("span", "figures");
      column.append(node, figures);
      columns.append(column);
      texts.push(await answerInto(node, figures, sparsity, sparsity > 0));
      if (texts.length > 1) markDifference(texts[0], node);
    }
    $("status").textContent = "Done.";
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("status").textContent = stopped ? "Stopped." : error.message;
    if (!stopped) columns.append(element("div", "answer error", error.message));
    if (!texts.length) texts.push(columns.querySelector(".answer:not(.error)")?.textContent ?? "");
  }
  state.messages.push({ role: "assistant", content: texts.at(-1) });
  state.controller = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("message").focus();
  showMap((await (await call("/sparsity")).json()).achieved);
}

function showMap(layers) {
  const names = layers.length ? Object.keys(layers[0]) : [];
  if (!names.length) { $("map").textContent = "No sparse answer yet."; return; }
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  head.append(element("th", "", "layer"), ...names.map((name) => element("th", "", name)));
  for (const [i, layer] of layers.entries()) {
    const row = table.insertRow();
    row.append(element("th", "", String(i)));
    for (const name of names) {
      const cell = row.insertCell();
      cell.textContent = `${Math.round(100 * layer[name])}%`;
      cell.style.background = `color-mix(in oklab, var(--strong) ${Math.round(80 * layer[name])}%, transparent)`;
    }
  }
  $("map").replaceChildren(table);
}

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => state.controller?.abort());
$("sparsity").addEventListener("input", showSparsity);
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("reset").addEventListener("click", () => {
  state.controller?.abort();
  state.messages = [];
  $("conversation").replaceChildren();
  $("status").textContent = "";
  $("message").focus();
});
setUp().catch((error) => { $("status").textContent = `The server does not answer: ${error.message}`; });
