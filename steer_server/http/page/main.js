// The page: its form, its runs and what they bring.

import { askForToken, isAskingForToken, stopAsking, tokenIsGood, watchToken } from "./access.js";
import { ApiError, call, events } from "./api.js";
import { ArmEditor } from "./arms.js";
import { Column } from "./column.js";
import { ConceptDialog } from "./concept.js";
import { asCli, asCsv, asCurl, asPython, notForCli } from "./copies.js";
import { byId, el, number, short } from "./dom.js";
import { showHistory } from "./history.js";
import * as kept from "./kept.js";
import { action, put, say, tell, tip } from "./messages.js";
import { withPatience } from "./patience.js";
import { checked, compareRequest, emptyPrompt, fromFragment, newArm, newSettings, toFragment } from "./settings.js";
import { VoteView } from "./vote.js";

const NORMAL = "normal";
const MAX_LINK = 30000;
const MAX_REPORTED = 20000;
const FIELDS = ["max_tokens", "temperature", "top_p", "repetition_penalty"];

const page = {
  settings: newSettings(), operators: [], model: null, columns: new Map(), ran: null, abort: null, show: "diff", isUp: null, isLinkGood: true,
};
const editor = new ArmEditor(byId("arms"), () => { keepTyped(); vote.refresh(); });
const concept = new ConceptDialog(useOperator);
const vote = new VoteView(byId("vote-view"), () => page.settings, tell);

// ---- the form

function showForm() {
  const { settings } = page;
  byId("prompt").value = settings.prompt;
  byId("chat").checked = settings.chat;
  byId("marks").value = settings.marks;
  for (const name of FIELDS) byId(name).value = settings.sampling[name] ?? "";
  byId("seed").value = settings.sampling.seed ?? "";
  byId("ignore_eos").checked = settings.sampling.ignore_eos;
  editor.show(settings, page.operators);
  notePrompt();
  vote.refresh();
}

function readForm() {
  const { settings } = page;
  for (const name of FIELDS) {
    const { value } = byId(name);
    settings.sampling[name] = value.trim() === "" ? null : Number(value);
  }
  const seed = byId("seed").value.trim();
  settings.sampling.seed = seed === "" ? null : seed;
  settings.sampling.ignore_eos = byId("ignore_eos").checked;
  settings.marks = byId("marks").value;
  settings.chat = byId("chat").checked;
}

function keepTyped() {
  kept.keepDraft(page.settings);
}

function notePrompt() {
  const note = byId("prompt-note");
  const most = page.model?.limits?.max_prompt_bytes ?? Infinity;
  const size = new TextEncoder().encode(page.settings.prompt).length;
  let text = "";
  if (page.settings.ids) text = `Goes on from a token: ${page.settings.ids.length} token ids. Editing the text makes it a text again.`;
  if (!page.settings.ids && size > most) text = `The prompt has ${size.toLocaleString()} bytes; this server accepts ${most.toLocaleString()}.`;
  note.textContent = text;
  note.hidden = !text;
  return !page.settings.ids && size > most ? text : "";
}

const marks = () => {
  const typed = page.settings.marks.split(",").map((word) => word.trim()).filter(Boolean);
  if (typed.length) return typed;
  const uses = (page.ran ?? page.settings).arms.flatMap((arm) => arm.uses);
  return [...new Set(uses.flatMap((use) => (use.words ? use.words.split(",").map((word) => word.replace(/\*.*$/, "").trim()) : use.name.split("-"))))].filter((word) => word.length > 2);
};

// ---- the server

async function meetServer() {
  const isAnswer = isAskingForToken();
  const asked = kept.token();
  try {
    const [model, { operators }] = await Promise.all([call("model"), call("operators")]);
    // Another token since, or none: this is an answer to one that is no more, and another is on its way.
    if (kept.token() !== asked) return;
    const isNew = !page.isUp;
    tokenIsGood(isAnswer);
    Object.assign(page, { model, operators: operators ?? [], isUp: true });
    byId("server").textContent = `${model.model} · ${model.engine} · ${model.dtype} on ${model.device} · ${page.operators.length} operator${page.operators.length === 1 ? "" : "s"}`;
    byId("server").dataset.kind = "up";
    byId("chat-field").hidden = !model.has_chat_template;
    concept.offer(model);
    if (isNew) {
      if (!page.settings.arms.length && !page.begun) {
        const usable = page.operators.find((operator) => !operator.problem && !operator.lens) ?? page.operators.find((operator) => !operator.problem);
        if (usable) page.settings.arms.push(newArm("arm 1", usable.name));
      }
      page.begun = true;
      showForm();
      if (page.isLinkGood) checkDigests();
    }
    notePrompt();
  } catch (error) {
    if (kept.token() !== asked) return;
    page.isUp = false;
    byId("server").textContent = error.reachable === false ? "The server cannot be reached; what you typed is kept."
      : error.status === 401 ? "The server asks for a token; what you typed is kept." : error.message;
    if (error.reachable === false) stopAsking();
    if (error.status === 403) askForToken(`Another token is needed: ${error.message}.`);
    byId("server").dataset.kind = "down";
  }
}

/** Takes an operator that has just come into service into an arm of its own, where none has it. */
async function useOperator(name) {
  await meetServer();
  const { arms } = page.settings;
  if (!arms.some((arm) => arm.uses.some((use) => use.name === name))) arms.push(newArm(arms.some((arm) => arm.name === name) ? `${name} built` : name, name));
  for (const use of arms.flatMap((arm) => arm.uses)) if (use.name === name) use.digest = null;
  showForm();
  keepTyped();
  say(`${name} is served: run to see what it does.`);
}

/** Says which operators of a link are gone, or have another version. */
function checkDigests() {
  const served = new Map(page.operators.map((operator) => [operator.name, operator]));
  const lines = [];
  for (const use of page.settings.arms.flatMap((arm) => arm.uses)) {
    const operator = served.get(use.name);
    if (!operator) lines.push(`${use.name || "an operator"} is not served here any more.`);
    else if (use.digest && use.digest !== operator.digest) lines.push(`${use.name}: asked for as ${short(use.digest)}, served as ${short(operator.digest)}.`);
  }
  if (!lines.length) return true;
  tell(new ApiError([...new Set(lines)].join(" ")), action("Use the versions that are served", () => {
    for (const use of page.settings.arms.flatMap((arm) => arm.uses)) use.digest = null;
    tell(null);
    showForm();
    keepTyped();
  }));
  return false;
}

// ---- runs

function busy(is) {
  byId("stop").disabled = !is;
  byId("run").disabled = is;
  byId("reroll").disabled = is || !page.ran;
}

async function run() {
  readForm();
  keepTyped();
  view("compare");
  say("");
  const wrong = emptyPrompt(page.settings) || notePrompt();
  if (wrong) return tell(new ApiError(wrong));
  page.abort?.abort();
  const abort = new AbortController();
  page.abort = abort;
  const asked = structuredClone(page.settings);
  let columns = new Map();
  tell(null);
  busy(true);
  say("Waiting for the server …");
  try {
    await withPatience(() => follow(asked, abort.signal, () => { columns = begin(asked); }), abort.signal);
    say(`Done: ${columns.size} texts.`);
    finishRun();
  } catch (error) {
    const stopped = error.name === "AbortError";
    for (const column of columns.values()) column.broken(stopped ? "stopped" : "cut off");
    say(stopped ? "Stopped." : "");
    if (!stopped) fail(error);
  } finally {
    if (page.abort === abort) {
      page.abort = null;
      busy(false);
    }
  }
}

/** Puts columns for the texts of these settings in the place of those that were there. */
function begin(asked) {
  page.ran = asked;
  const names = [NORMAL, ...asked.arms.map((arm) => arm.name)];
  page.columns = new Map(names.map((name) => [name, new Column(name === NORMAL ? "plain" : name, { fork, tip, isDrawn: () => asked.sampling.temperature > 0 })]));
  byId("columns").replaceChildren(...[...page.columns.values()].map((column) => column.element));
  byId("columns").style.setProperty("--count", names.length);
  byId("empty").hidden = true;
  byId("bar").hidden = false;
  byId("legend").hidden = true;
  goTo("results");
  return page.columns;
}

/** Shows the texts as they come. `began` is called before the first: what is refused leaves the earlier texts in place. */
async function follow(asked, signal, began) {
  // What each token gained and lost; for a long text of many arms that is more than the server reports.
  const request = compareRequest(asked);
  if (request.arms.length && (request.sampling.max_tokens ?? 128) * request.arms.length <= MAX_REPORTED) request.report = { top: 5 };
  const seen = new Set();
  let isFirst = true;
  for await (const event of events("Compare", request, signal)) {
    if (isFirst) began();
    isFirst = false;
    if (event.compared) {
      for (const comparison of event.compared.comparisons ?? []) page.columns.get(comparison.arm)?.compared(comparison);
      continue;
    }
    const column = page.columns.get(event.arm);
    if (!column) continue;
    if (event.started) column.started(event.started);
    if (event.delta) column.delta(event.delta);
    if (event.finished) {
      column.end(event.finished);
      seen.add(event.arm);
    }
    say(seen.size ? `${seen.size} of ${page.columns.size} texts are whole …` : "Writing …");
  }
}

function fail(error) {
  const other = action("Use another token", () => askForToken("Another token is needed for this."));
  tell(error, action("Run again", run), ...(error.status === 403 ? [other] : []));
  if (error.reachable === false) meetServer();
}

function finishRun() {
  const seed = page.columns.get(NORMAL)?.finished?.seed;
  if (page.ran.sampling.temperature > 0 && page.ran.sampling.seed === null && seed) page.ran.sampling.seed = String(seed);
  drawAll();
  kept.remember({ time: Date.now(), settings: page.ran, texts: shownTexts().map(({ name, text }) => ({ name, text: text.slice(0, 4000) })) });
}

const shownTexts = () => [...page.columns.values()].map((column) => ({
  name: column.name, text: column.finished?.text ?? column.wholeText, finished: column.finished, comparison: column.comparison,
}));

function drawAll() {
  const plain = page.columns.get(NORMAL);
  const base = plain?.finished ? plain.wholeText : null;
  const values = [...page.columns.values()].flatMap((column) => (column.comparison?.kl_per_token ?? []).map(Number)).filter(Number.isFinite).sort((a, b) => a - b);
  const top = Math.max(values[Math.floor(0.95 * values.length)] ?? 1, 0.05);
  for (const column of page.columns.values()) column.draw(column === plain ? null : base, marks(), page.show, top);
  const legend = byId("legend");
  legend.hidden = page.show === "plain" || !page.columns.size;
  legend.replaceChildren(...(page.show === "kl"
    ? ["KL(plain‖arm) at each token, 0 ", el("span", { className: "ramp", "aria-hidden": "true" }), ` ${number(top, 2)} nats and more`]
    : [el("ins", {}, "not in the plain text"), " · ", el("mark", {}, "marked word"), " · arrow keys walk through the tokens"]));
}

// ---- what a text offers

function fork(column, place) {
  const ids = column.finished?.token_ids;
  if (!ids) return;
  const text = column.pieces.reduce(([sum, count], piece) => (count <= place ? [sum + piece.text, count + piece.ids.length] : [sum, count]), ["", 0])[0];
  page.settings = structuredClone(page.ran);
  page.settings.ids = [...column.promptIds, ...ids.slice(0, place + 1)];
  page.settings.prompt = `${page.ran.prompt}${text}`;
  page.settings.chat = false;
  tip(null);
  showForm();
  keepTyped();
  say(`The prompt now ends at token ${place} of ${column.name}: run to go on from there.`);
  byId("run").focus();
}

async function copy(kind) {
  const settings = structuredClone(page.ran ?? page.settings);
  const target = page.model && location.hostname !== "localhost" && location.hostname !== "127.0.0.1" ? `${location.hostname}:50051` : "";
  if (kind === "link") {
    pin(settings);
    const fragment = toFragment(settings);
    if (fragment.length > MAX_LINK) return tell(new ApiError("This experiment is too long for a link; export it as JSON."));
    window.history.replaceState(null, "", `#${fragment}`);
    return put(`${location.origin}${location.pathname}#${fragment}`, "The link");
  }
  if (kind === "cli" && notForCli(settings)) return tell(new ApiError(`The command line cannot say this: ${notForCli(settings)}. Python and curl can.`));
  const texts = { cli: asCli, python: asPython, curl: asCurl };
  const where = { target, origin: location.origin, tls: location.protocol === "https:", token: Boolean(kept.token()) };
  const name = { cli: "The command", python: "The script", curl: "The command" }[kind];
  return put(texts[kind](settings, where), where.token ? `${name}, which takes the token from STEER_TOKEN,` : name);
}

function pin(settings) {
  const served = new Map(page.operators.map((operator) => [operator.name, operator.digest]));
  for (const use of settings.arms.flatMap((arm) => arm.uses)) use.digest = use.digest ?? served.get(use.name) ?? null;
}

function save(kind) {
  const texts = shownTexts();
  const settings = structuredClone(page.ran ?? page.settings);
  const content = kind === "csv" ? asCsv(settings, texts)
    : `${JSON.stringify({ model: page.model?.model, model_fingerprint: page.model?.model_fingerprint, settings, request: compareRequest(settings), texts }, null, 2)}\n`;
  const url = URL.createObjectURL(new Blob([content], { type: kind === "csv" ? "text/csv" : "application/json" }));
  el("a", { href: url, download: `steering.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// ---- views

/** On a narrow screen form and texts are one below the other: what somebody asked to see may be out of sight. */
function goTo(id) {
  if (matchMedia("(max-width: 820px)").matches) byId(id).scrollIntoView();
}

function view(name) {
  for (const each of ["compare", "vote", "history"]) {
    byId(`${each}-view`).hidden = each !== name;
    byId(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  if (name === "history") showHistory(open);
  if (name === "vote") vote.refresh();
}

function open(settings) {
  page.settings = settings;
  showForm();
  keepTyped();
  view("compare");
  goTo("settings");
  checkDigests();
}

function load(fragment) {
  try {
    const settings = fromFragment(fragment);
    if (!settings) return false;
    page.settings = settings;
    return true;
  } catch (error) {
    page.isLinkGood = false;
    tell(new ApiError(`This link cannot be read: ${error.message}. Nothing was changed.`));
    return false;
  }
}

// ---- what people do

byId("settings").addEventListener("submit", (event) => { event.preventDefault(); run(); });
byId("settings").addEventListener("input", (event) => {
  if (event.target.id === "prompt") {
    page.settings.prompt = byId("prompt").value;
    page.settings.ids = null;
    notePrompt();
  }
  readForm();
  keepTyped();
  if (event.target.id === "marks" && page.ran) {
    page.ran.marks = page.settings.marks;
    drawAll();
  }
});
byId("add-arm").addEventListener("click", () => editor.add());
byId("stop").addEventListener("click", () => page.abort?.abort());
byId("reroll").addEventListener("click", () => {
  page.settings.sampling.seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  byId("seed").value = page.settings.sampling.seed;
  run();
  if (!page.settings.sampling.temperature) say("At temperature 0 every seed gives the same text.");
});
for (const name of ["compare", "vote", "history"]) byId(`view-${name}`).addEventListener("click", () => { view(name); goTo("results"); });
for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => {
    page.show = button.dataset.show;
    for (const other of document.querySelectorAll("[data-show]")) other.setAttribute("aria-pressed", String(other === button));
    drawAll();
  });
}
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => save(button.dataset.export));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("run").disabled) { event.preventDefault(); run(); }
  if (event.key === "Escape") { tip(null); page.abort?.abort(); }
});
addEventListener("hashchange", () => { if (load(location.hash)) { showForm(); keepTyped(); checkDigests(); } });

const typed = kept.draft();
if (!load(location.hash) && typed) {
  try {
    page.settings = checked(typed);
  } catch { /* of another version of this page */ }
}
showForm();
watchToken(meetServer);
await meetServer();
// Asked for again in a while: sooner where it could not be reached.
for (;;) {
  await new Promise((resolve) => { setTimeout(resolve, page.isUp ? 20000 : 3000); });
  if (!page.abort && !document.hidden && !isAskingForToken()) await meetServer();
}
