// The page of a server: chat, modules, teaching. Talks to the same paths as every client does.

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(share * 100).toFixed(share > 0.995 || share < 0.005 ? 1 : 0)} %`;

function size(bytes) {
  if (bytes === null || bytes === undefined) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; unit += 1) bytes /= 1000;
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

const counted = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

// An element with a class, a text, and others inside; never a text as HTML.
function make(tag, { text, ...attributes } = {}, ...inside) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...inside.filter((one) => one !== null));
  return made;
}

// The key: from the link that the terminal shows, or from the dialog; kept as long as the tab.

const inLink = new URLSearchParams(location.hash.slice(1)).get("key");
if (inLink) {
  sessionStorage.setItem("growlm-key", inLink);
  history.replaceState(null, "", location.pathname);
}
let mayAdmin = false;

class Refused extends Error {
  constructor(status, message, code = null) {
    super(message);
    [this.status, this.code] = [status, code];
  }
}

async function ask(path, { method = "GET", json, body, signal } = {}) {
  const key = sessionStorage.getItem("growlm-key");
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(json && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: json ? JSON.stringify(json) : body });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server does not answer; is it running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Refused(response.status, told.error?.message ?? `${path}: status ${response.status}`, told.error?.code);
  }
  return response;
}

const get = async (path) => (await ask(path)).json();

// What a stream of server-sent events says, one after another.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

let unreached = false; // whether what is told is that nobody answers

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  unreached = false;
}

function told(error) {
  const wrong = sessionStorage.getItem("growlm-key") ? "This key is wrong: give another under “Key”." : "This server asks for a key: give it under “Key”.";
  notice(error.status === 401 ? wrong : error.message);
  unreached = error.status === 0;
}

// Tabs

const tabs = ["chat", "modules", "teach"];
function show(name, focus = false) {
  for (const one of tabs) {
    const [tab, chosen] = [$(`tab-${one}`), one === name];
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(one).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  look();
}
for (const [at, name] of tabs.entries()) {
  $(`tab-${name}`).addEventListener("click", () => show(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(tabs[(at + step + tabs.length) % tabs.length], true);
  });
}

// Chat

let turns = [];
let answering = null;
const hint = document.querySelector("#turns > .hint");

function addTurn(role, text) {
  const said = make("div", { class: "said", text });
  const about = make("div", { class: "about" });
  const turn = make("div", { class: `turn ${role}` }, said, about);
  $("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, said, about };
}

function whoWrote(growlm, tokens, seconds, first) {
  const about = [make("b", { text: growlm.module ?? "base" })];
  const scores = Object.entries(growlm.scores);
  if (scores.length) {
    const others = scores.filter(([name, score]) => name !== (growlm.module ?? "none") && score > 0.005).slice(0, 3);
    const own = growlm.scores[growlm.module ?? "none"];
    about.push(` ${percent(own)} sure`, others.length ? ` (${others.map(([n, s]) => `${n} ${percent(s)}`).join(", ")})` : "");
  } else about.push(", as you asked");
  if (growlm.loaded.length) about.push(` · read from the disk: ${growlm.loaded.join(", ")}`);
  if (tokens) about.push(` · ${tokens} tokens, the first after ${first.toFixed(1)} s, ${(tokens / seconds).toFixed(1)} a second`);
  return about;
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("ask-text").value.trim();
  if (!text || answering) return;
  document.querySelectorAll("#turns > .hint, .refused").forEach((one) => one.remove());
  notice("");
  const question = addTurn("user", text);
  const asked = [...turns, { role: "user", content: text }];
  const { turn, said, about } = addTurn("assistant waits", "");
  $("ask-text").value = "";
  answering = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  const began = performance.now();
  let [growlm, usage, first, reason] = [null, null, null, null];
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      json: { model: $("model").value, messages: asked, stream: true, stream_options: { include_usage: true } },
      signal: answering.signal,
    });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Refused(500, chunk.error.message);
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        first ??= (performance.now() - began) / 1000;
        said.textContent += choice.delta.content;
        turn.classList.remove("waits");
        turn.scrollIntoView({ block: "end" });
      }
      growlm = chunk.growlm ?? growlm;
      reason = choice?.finish_reason ?? reason;
      usage = chunk.usage ?? usage;
    }
    turns = [...asked, { role: "assistant", content: said.textContent }];
    if (!said.textContent) about.append("It had nothing to say. ");
    const seconds = (performance.now() - began) / 1000;
    if (growlm) about.append(...whoWrote(growlm, usage?.completion_tokens, seconds, first ?? seconds));
    if (reason === "length") about.append(" · cut: as long as an answer may be");
  } catch (error) {
    if (error.name === "AbortError") {
      about.append(...(growlm ? whoWrote(growlm) : []), growlm ? " · stopped" : "stopped");
      turns = [...asked, { role: "assistant", content: said.textContent }];
    } else {
      const full = turns.length && error.message.includes("positions") ? "; or begin a new chat: all of this one is read again" : "";
      about.append(make("span", { class: "wrong", text: error.message + full }));
      for (const one of [question.turn, turn]) one.classList.add("refused");
      turn.scrollIntoView({ block: "end" });
      $("ask-text").value = text;
      if (error.status === 401) $("key-dialog").showModal();
    }
  } finally {
    turn.classList.remove("waits");
    answering = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    $("ask-text").focus();
    look();
  }
});
$("ask-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => answering?.abort());
$("anew").addEventListener("click", () => {
  answering?.abort();
  turns = [];
  $("turns").replaceChildren(hint);
  $("ask-text").focus();
});

// Modules, and what is in memory

function fillChoices(cards) {
  const names = cards.map((card) => card.id);
  const select = $("model");
  if (names.join() === [...select.options].map((option) => option.value).join()) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name, text: name })));
  select.value = names.includes(chosen) ? chosen : "auto";
}

function card(one) {
  const facts = one.damaged ? [["damaged", "its files cannot be read; verify the store"]] : [["kind", one.kind], ["version", one.version], ["weights", size(one.bytes)]];
  if (one.parameters) facts.push(["parameters", one.parameters.toLocaleString("en")]);
  if (one.tokens) facts.push(["learned from", `${counted(one.tokens, "token")} in ${counted(one.documents, "document")}`]);
  if (one.loss_before) facts.push(["held-out loss", `${one.loss_before.toFixed(3)} before, ${one.loss_after.toFixed(3)} after`]);
  const act = (verb) =>
    make("button", {
      type: "button", text: verb, "aria-label": `${verb} ${one.id}`,
      onclick: () => ask(`admin/modules/${one.id}/${verb}`, { method: "POST" }).then(look, told),
    });
  const use = make("button", {
    type: "button", text: "ask it", "aria-label": `ask ${one.id}`,
    onclick: () => {
      $("model").value = one.id;
      show("chat");
      $("ask-text").focus();
    },
  });
  const remove = make("button", {
    type: "button", text: "remove", "aria-label": `remove ${one.id}`,
    onclick: () => {
      if (!confirm(`Remove ${one.id}, all its versions? What it has learned is gone.`)) return;
      show("teach");
      begin({ verb: "remove", module: one.id }).catch(told);
    },
  });
  return make(
    "li", { "data-module": one.id },
    make("h3", { text: one.id }),
    make("span", { class: `tag ${one.resident ? "on" : ""}`, text: one.resident ? "in memory" : "on the disk" }),
    one.pinned ? make("span", { class: "tag on", text: "pinned" }) : null,
    make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })])),
    make("div", { class: "row" }, use, ...(mayAdmin ? [act(one.pinned ? "unpin" : "pin"), one.pinned ? "" : act("evict"), remove] : [])),
  );
}

let last = null; // tokens that were written, and when

function fillMemory(status) {
  const { budget, used, base, router, modules, workspace } = status.memory;
  const parts = { base, router, modules, texts: Math.max(used - base - router - modules - workspace, 0), workspace };
  const all = budget ?? used;
  $("memory-bar").replaceChildren(
    ...Object.entries(parts).map(([name, bytes]) => {
      const part = make("span", { class: `part-${name}`, title: `${name} ${size(bytes)}` });
      part.style.width = `${(100 * bytes) / all}%`;
      return part;
    }),
  );
  const listed = Object.entries(parts).filter(([, bytes]) => bytes).map(([name, bytes]) => `${name} ${size(bytes)}`);
  $("memory-told").textContent = `${size(used)}${budget ? ` of ${size(budget)}` : ", without a bound"}: ${listed.join(", ")}`;
  $("memory-bar").setAttribute("aria-label", $("memory-told").textContent);
  const now = { tokens: status.generated_tokens, at: performance.now() };
  const rate = last ? (1000 * (now.tokens - last.tokens)) / (now.at - last.at) : 0;
  last = now;
  $("load-told").textContent = `${status.running} being answered, ${status.waiting} waiting, ${rate.toFixed(1)} tokens a second`;
}

function replace(list, items, same) {
  if (list.dataset.same === same) return; // what has the focus keeps it
  list.dataset.same = same;
  list.replaceChildren(...items());
}

async function look() {
  try {
    const { data } = await get("v1/models");
    if (unreached) await enter(); // it may be another server by now, with another key
    fillChoices(data);
    const modules = data.filter((one) => one.parent);
    $("store").textContent = data[0].root;
    $("modules-none").hidden = modules.length > 0;
    replace($("cards"), () => modules.map(card), JSON.stringify([mayAdmin, modules]));
  } catch (error) {
    told(error);
    return;
  }
  if (!mayAdmin) return;
  try {
    fillMemory(await get("admin/status"));
  } catch (error) {
    told(error);
  }
}

// Teaching

let chosen = [];
let following = new AbortController(); // those whose jobs are listed

let kinds = []; // of files that can be learned from

// What is wrong with a file, as far as a browser can tell.
function amiss(file) {
  if (!file.size) return "is empty";
  const kind = file.name.includes(".") ? `.${file.name.split(".").pop().toLowerCase()}` : "";
  if (kinds.length && !kinds.includes(kind)) return kind ? `files of the kind ${kind} are not read` : "a file without an ending is not read; .txt is text";
  return "";
}

function choose(files) {
  chosen = [...chosen, ...files];
  $("file-list").replaceChildren(
    ...chosen.map((file, at) =>
      make("li", { text: `${file.name}, ${size(file.size)} `, class: amiss(file) ? "wrong" : "" },
        amiss(file) ? `${amiss(file)} ` : "",
        make("button", {
          type: "button", text: "×", "aria-label": `leave out ${file.name}`,
          onclick: () => {
            chosen.splice(at, 1);
            choose([]);
          },
        }),
      )),
  );
  if (files.length && !$("teach-name").value) {
    $("teach-name").value = files[0].name.split(".")[0].toLowerCase().replace(/[^a-z0-9_-]+/g, "_").replace(/^[_-]+/, "");
  }
}
$("files").addEventListener("change", () => {
  choose([...$("files").files]);
  $("files").value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose([...event.dataTransfer.files]);
  });
}

async function begin(job) {
  const begun = await (await ask("admin/jobs", { method: "POST", json: job })).json();
  follow(begun);
}

$("teach-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  notice("");
  if (!chosen.length) return notice("Choose a file to learn from first.");
  const wrong = chosen.find(amiss);
  if (wrong) return notice(`${wrong.name}: ${amiss(wrong)}; leave it out.`);
  if (!$("teach-name").value) return notice("Give the module a name first.");
  const number = (id) => ($(id).value ? Number($(id).value) : null);
  const button = event.submitter;
  button.disabled = true;
  try {
    for (const file of chosen) {
      if (file.sent) continue; // at an earlier try
      const sent = await ask(`admin/files/${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
      file.sent = (await sent.json()).id;
    }
    const files = chosen.map((file) => file.sent);
    await begin({
      verb: $("teach-update").checked ? "update" : "learn",
      module: $("teach-name").value,
      files,
      kind: $("teach-kind").value || null,
      tokens: number("teach-tokens"),
      sequence_length: number("teach-length"),
      text_key: $("teach-key").value || null,
      separator: $("teach-blank").checked ? "\\n\\n" : null,
    });
    chosen = [];
    choose([]);
    $("teach-name").value = "";
  } catch (error) {
    if (error.code === "no_such_file") for (const file of chosen) delete file.sent; // the server has let go of them
    if (error.code === "module_exists") $("teach-more").open = true;
    if (error.code === "module_exists") notice(`${$("teach-name").value} is there already: tick “the next version”, or take another name.`);
    else told(error);
  } finally {
    button.disabled = false;
  }
});
$("verify").addEventListener("click", () => begin({ verb: "verify" }).catch(told));

// Losses as they came, with what the ends of both axes stand for.
function curve(points, what, unit) {
  const ns = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(ns, "svg");
  drawing.setAttribute("viewBox", "0 0 100 40");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  drawing.setAttribute("aria-label", `loss from ${points[0][1].toFixed(3)} to ${points.at(-1)[1].toFixed(3)}`);
  const path = document.createElementNS(ns, "path");
  const at = ([x, y]) => `${((100 * (x - first)) / (last - first || 1)).toFixed(2)} ${(38 - (36 * (y - low)) / (high - low || 1)).toFixed(2)}`;
  path.setAttribute("d", `M${points.map(at).join("L")}`);
  drawing.append(path);
  const mark = (name, text) => make("span", { class: name, text });
  return make("figure", { class: "curve" },
    make("figcaption", { class: "small", text: what }),
    mark("high", high.toFixed(3)), mark("low", low.toFixed(3)), drawing, mark("first", first), mark("last", `${last} ${unit}`));
}

function outcome(job) {
  const found = job.result;
  if (job.state === "failed" || job.state === "cancelled") return [make("p", { class: "wrong", text: job.error ?? job.state })];
  if (job.state !== "done" || !found) return [];
  if (!["learn", "update"].includes(job.verb)) return [make("p", { text: job.verb === "verify" ? "All files are as they should be." : "It is gone." })];
  const better = found.loss_after < found.loss_before;
  return [
    make("p", { class: better ? "" : "wrong", text:
      `Held-out loss ${found.loss_before.toFixed(3)} before, ${found.loss_after.toFixed(3)} after: ` +
      (better ? "it has learned, and answers from now on." : "it does worse than the base; give it more text, or remove it.") }),
    make("button", {
      type: "button", text: `Ask ${job.module}`,
      onclick: () => {
        look().then(() => ($("model").value = job.module));
        show("chat");
        $("ask-text").focus();
      },
    }),
    ...found.samples.slice(0, 3).map((sample) =>
      make("div", { class: "sample" },
        ...[["Text it has not seen", sample.prompt], ["The base goes on", sample.base], ["The module goes on", sample.module], ["It goes on in truth", sample.text]]
          .flatMap(([label, text]) => [make("p", { class: "label", text: label }), make("p", { text })]))),
  ];
}

function follow(job) {
  $("jobs-none").hidden = true;
  const name = [job.verb, job.module].filter(Boolean).join(" ");
  const [state, bar, note] = [make("span", { class: "tag" }), make("progress", { "aria-label": `how far ${name} is` }), make("p", { class: "small" })];
  const [drawn, log, ended] = [make("div"), make("pre"), make("div")];
  const cancel = make("button", {
    type: "button", text: "Cancel", "aria-label": `cancel ${name}`,
    onclick: () => ask(`admin/jobs/${job.id}`, { method: "DELETE" }).catch(told),
  });
  $("jobs").prepend(
    make("li", { "data-job": job.id }, make("h3", { text: name }), state, bar, note, drawn, ended,
      make("div", { class: "row" }, cancel),
      make("details", {}, make("summary", { text: "What it says" }), log)),
  );
  let [losses, phase, line] = [[], "", ""];
  const fill = (now) => {
    const over = !["queued", "running"].includes(now.state);
    state.textContent = now.state;
    state.classList.toggle("on", now.state === "done");
    cancel.hidden = over;
    bar.hidden = over || now.state === "queued";
    const { title, done, total, unit, loss } = now.progress;
    if (total) [bar.max, bar.value] = [total, done];
    const seconds = now.seconds === null ? "" : `${Math.round(now.seconds)} s`;
    note.textContent = over ? seconds : [title ? `${title}: ${done} of ${total} ${unit}` : line, loss && `loss ${loss.toFixed(3)}`, title ? seconds : ""].filter(Boolean).join(", ");
    if (loss && title !== phase) [losses, phase] = [[], title];
    if (loss && losses.at(-1)?.[0] !== done) losses.push([done, loss]);
    const held = now.result?.validation && Object.entries(now.result.validation).map(([step, y]) => [Number(step), y]);
    if (held?.length > 1) drawn.replaceChildren(curve(held, "Loss of what is held out", "steps"));
    else if (losses.length > 1) drawn.replaceChildren(curve(losses, `Loss: ${phase}`, unit ?? ""));
    if (over) {
      ended.replaceChildren(...outcome(now));
      look();
    }
  };
  fill(job);
  const { signal } = following;
  (async () => {
    try {
      while (job.state === "queued" && !signal.aborted) {
        // a stream for each that waits would take all connections
        await new Promise((done) => setTimeout(done, 1000));
        fill((job = await get(`admin/jobs/${job.id}`)));
      }
      for await (const event of events(await ask(`admin/jobs/${job.id}/events`, { signal }))) {
        if (event.type === "line") log.textContent += `${(line = event.line)}\n`;
        else fill(event);
      }
    } catch (error) {
      if (error.name !== "AbortError") told(error);
    }
  })();
}

// The key, and what it opens

async function enter() {
  notice("");
  fillChoices([{ id: "auto" }]);
  const could = mayAdmin;
  try {
    await get("admin/status");
    mayAdmin = true;
  } catch (error) {
    mayAdmin = false;
    $("teach-closed").textContent = error.code === "no_admin_key" ? "This server was started without an admin key, so that nobody can teach it here." : "To teach takes the admin key of this server: give it under “Key”.";
  }
  if (could && !mayAdmin) notice("This key opens nothing more: if the server was started again, open the link that its terminal shows.");
  $("teach-closed").hidden = mayAdmin;
  $("teach-form").hidden = $("memory").hidden = $("jobs-part").hidden = !mayAdmin;
  following.abort();
  following = new AbortController();
  $("jobs").replaceChildren();
  if (mayAdmin) {
    const { data } = await get("admin/jobs");
    data.forEach(follow);
    const known = await get("admin/kinds");
    kinds = known.files;
    $("teach-kind").replaceChildren(make("option", { value: "", text: "auto" }), ...known.data.map((kind) => make("option", { value: kind, text: kind })));
  }
  await look();
}
$("key-open").addEventListener("click", () => {
  $("key").value = sessionStorage.getItem("growlm-key") ?? "";
  $("key-dialog").showModal();
});
$("key-leave").addEventListener("click", () => $("key-dialog").close("cancel"));
$("key-dialog").addEventListener("close", async () => {
  if ($("key-dialog").returnValue !== "ok") return;
  const before = sessionStorage.getItem("growlm-key");
  sessionStorage.setItem("growlm-key", $("key").value.trim());
  try {
    await get("v1/models");
    if (before) mayAdmin = false; // another key: what it opens is found out
    await enter();
  } catch (error) {
    if (before) sessionStorage.setItem("growlm-key", before);
    else sessionStorage.removeItem("growlm-key");
    notice(error.status === 401 ? "This key is wrong; the one before is kept." : error.message);
  }
});

setInterval(() => {
  if (!document.hidden) look();
}, 2000);
enter();
