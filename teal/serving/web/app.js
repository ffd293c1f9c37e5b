"use strict";
// Chat page of serve.py. Talks to /v1/chat/completions (streamed) and /sparsity; no build step, no other host.

const $ = (id) => document.getElementById(id);
const CHAT = "teal-chat"; // in localStorage: the turns, so that a reload keeps them
const KEY = "key"; // in sessionStorage

// A chat is its turns, {message, answers: [{sparsity, text, figures}]}. "New chat" puts another in its place, and what
// still happens to the old one stays there.
const state = { turns: [], plans: [0], controller: null };

function plan() { return state.plans[Number($("sparsity").value)] ?? 0; }

function say(text) { $("status").textContent = text; }

function savedTurns() {
  try {
    const turns = JSON.parse(localStorage.getItem(CHAT)) ?? [];
    const whole = (turn) => typeof turn.message === "string" && turn.answers.length &&
      turn.answers.every((answer) => typeof answer.text === "string");
    return turns.every(whole) ? turns : [];
  } catch { return []; } // written by another version, or storage is off
}

function saveTurns(turns) {
  try { localStorage.setItem(CHAT, JSON.stringify(turns)); } catch { say("This browser keeps no more: a reload forgets the chat."); }
}

// The API key that the user gives, or "" for none.
function askForKey(title) {
  const dialog = $("key-dialog");
  $("key-title").textContent = title;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue ? $("key").value : ""), { once: true });
  });
}

// fetch with the API key, asked for while the server wants another. Errors say what a person can do.
async function call(path, options = {}) {
  for (;;) {
    const saved = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(saved ? { Authorization: `Bearer ${saved}` } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (answer.status !== 401) return answer;
    sessionStorage.removeItem(KEY);
    const given = await askForKey(saved ? "This API key is wrong. Another one?" : "This server wants an API key.");
    if (!given) throw new Error(saved ? "The API key is wrong." : "This server wants an API key.");
    sessionStorage.setItem(KEY, given);
  }
}

async function setUp() {
  state.turns = savedTurns();
  showTurns();
  $("message").focus();
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

function showTurns() {
  for (const turn of state.turns) {
    const columns = addTurn($("conversation"), turn.message);
    const places = turn.answers.map(({ text, figures }) => {
      const place = addAnswer($("conversation"), columns);
      showMarkdown(place.node, text);
      place.figures.textContent = figures;
      return place;
    });
    if (places.length > 1) markDifference(places[0].node, places[1].node);
  }
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

function showSparsity() {
  const text = `${Math.round(100 * plan())}%`;
  $("sparsity-value").textContent = text;
  $("sparsity").setAttribute("aria-valuetext", text);
}

// The conversation so far, as the API takes it; a turn's last answer is the one that counts.
function messagesOf(turns, message) {
  const past = turns.flatMap((turn) => [
    { role: "user", content: turn.message }, { role: "assistant", content: turn.answers.at(-1).text },
  ]);
  return [...past, { role: "user", content: message }];
}

// The chunks of a streamed answer. Throws if the server reports an error or the connection ends early.
async function* chunks(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection was lost: the answer is not complete.");
    }
    if (part.done) throw new Error("The server ended the answer early.");
    held += part.value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// Streams one answer into its place, and keeps text and figures in answer as they come.
async function stream(answer, place, messages, signal) {
  const start = performance.now();
  let first = 0, tokens = 0;
  const body = {
    messages, stream: true, stream_options: { include_usage: true }, sparsity: answer.sparsity,
    temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value), seed: 0,
    count_sparsity: answer.sparsity > 0,
  };
  const response = await call("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of chunks(response)) {
    const piece = chunk.choices[0]?.delta?.content ?? "";
    if (piece) {
      first ||= performance.now();
      tokens += 1;
      answer.text += piece;
      place.show(answer.text);
    }
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
    const seconds = (performance.now() - first) / 1000;
    const rate = first && tokens > 1 ? `${((tokens - 1) / Math.max(seconds, 1e-3)).toFixed(1)} tok/s` : "…";
    const wait = first ? `first token ${((first - start) / 1000).toFixed(2)} s` : "";
    answer.figures = `${Math.round(100 * answer.sparsity)}% sparse · ${tokens} tokens · ${rate} · ${wait}`;
    place.figures.textContent = answer.figures;
  }
}

// One turn: all its answers, or as far as they came.
async function runTurn(turn, columns, messages, signal) {
  const sparsities = $("compare").checked && plan() > 0 ? [0, plan()] : [plan()];
  const places = [];
  for (const sparsity of sparsities) {
    const answer = { sparsity, text: "", figures: "" };
    turn.answers.push(answer);
    places.push(addAnswer($("conversation"), columns));
    try {
      await stream(answer, places.at(-1), messages, signal);
    } finally {
      places.at(-1).finish();
    }
    if (places.length > 1) markDifference(places[0].node, places[1].node);
  }
}

async function ask(event) {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || state.controller) return;
  $("message").value = "";
  const { turns } = state, turn = { message, answers: [] };
  const controller = state.controller = new AbortController();
  setBusy(true);
  say("Answering…");
  const columns = addTurn($("conversation"), message);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  let outcome = "Done.";
  try {
    await ready; // the sparsities are known
    await runTurn(turn, columns, messagesOf(turns, message), controller.signal);
  } catch (error) {
    outcome = error.name === "AbortError" ? "Stopped." : error.message;
    if (outcome !== "Stopped.") columns.append(element("div", "answer error", outcome));
  }
  if (state.turns !== turns) return; // a new chat has begun meanwhile
  turn.answers = turn.answers.filter((answer) => answer.text);
  if (turn.answers.length) {
    turns.push(turn);
    saveTurns(turns);
  } else if (!$("message").value) {
    $("message").value = message; // it was refused, or stopped before the first word: the model never saw it
  }
  state.controller = null;
  setBusy(false);
  say(outcome);
  $("message").focus();
  call("/sparsity").then((answer) => answer.json()).then((found) => showMap(found.achieved)).catch(() => {});
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
}

function newChat() {
  state.controller?.abort();
  state.controller = null;
  state.turns = [];
  saveTurns(state.turns);
  $("conversation").replaceChildren();
  CSS.highlights?.delete("differs");
  setBusy(false);
  say("");
  $("message").focus();
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
$("reset").addEventListener("click", newChat);
const ready = setUp().catch((error) => say(error.message));
