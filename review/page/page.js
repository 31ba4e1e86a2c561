// The review page: what is shown, what the keys do, and what goes to the server. All texts of others are set as text.

import { List } from "./list.js";
import { Viewer } from "./viewer.js";
import { chooseWords, fill } from "./words.js";

const WATCH = 4000; // milliseconds between two looks for what has changed
const SMALL = 192; // pixels, as the server makes them
const LARGE = 1600;
// A picture that was changed after its decision waits for another one.
const standing = ({ decision, changed }) => (changed ? "" : decision);
const FILTERS = {
  all: () => true,
  undecided: (item) => !standing(item),
  accepted: (item) => standing(item) === "accepted",
  rejected: (item) => standing(item) === "rejected",
  gate: ({ gate }) => gate === "rejected",
};
const DECIDED = ["decision", "decision_reason", "decided_by", "decided_at", "changed"]; // what a decision sets
const NAMED = new Set(["changed", "missing", "unsigned"]); // of what is not handed over
const KEPT = {
  name: "consislora.review.name",
  reasons: "consislora.review.reasons",
  order: "consislora.review.order",
  ground: "consislora.review.ground",
};

const find = (selector) => document.querySelector(selector);
const words = await chooseWords();
const viewer = new Viewer(find("#viewer"));
const list = new List(find("#list"), find("#rows"), fillRow, (index) => choose(index));
const state = {
  catalogue: null, // its name; null while there is none
  results: [], // as the server has them, with decisions on their way to it
  shown: [], // those that pass the filter, in order
  filter: "all",
  chosen: null, // the name of the result in the viewer
  number: 0, // of its picture
  undo: [], // what decisions replaced: name, decision, decision_reason
  etag: "",
};
let posting = Promise.resolve(); // decisions go one after another
let underWay = 0;

// What the server says

function address(route, query = {}) {
  return `review/${route}?${new URLSearchParams({ catalogue: state.catalogue, ...query })}`;
}

function pictureAddress({ name, version }, query) {
  return address("picture", { name, v: version.slice(0, version.lastIndexOf(" ")), ...query });
}

async function ask(url, options) {
  const answer = await fetch(url, options).catch(() => Promise.reject(new Error(words.unreachable)));
  if (answer.status === 304) return null;
  const said = await answer.json().catch(() => ({}));
  if (answer.ok) return Object.assign(said, { etag: answer.headers.get("ETag") });
  throw new Error(answer.status === 409 ? words.changed : (said.error?.message ?? said.error ?? answer.statusText));
}

function post(url, body) {
  return ask(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

async function refresh() {
  if (underWay || state.catalogue === null) return;
  const catalogue = state.catalogue;
  const said = await ask(address("results"), { headers: state.etag ? { "If-None-Match": state.etag } : {} });
  if (!said || underWay || catalogue !== state.catalogue) return; // an answer from before a decision
  state.etag = said.etag;
  state.results = said.results;
  showSummary(said.summary);
  show();
}

async function watch() {
  try {
    await (state.catalogue === null ? findCatalogues() : refresh());
    await showQueue();
    if (!state.chosen) find("#empty").textContent = whyNothing();
  } catch (error) {
    find(state.chosen ? "#queue" : "#empty").textContent = error.message; // what is said about a decision stays readable
    state.etag = ""; // pictures that did not come meanwhile are asked for again
  }
  setTimeout(watch, WATCH);
}

async function showQueue() {
  const { exec_info } = await ask("../prompt");
  const count = exec_info.queue_remaining;
  find("#queue").textContent = count ? fill(words.inQueue, count) : "";
}

// What is shown

function show() {
  find("[data-filter=gate]").hidden = !state.results.some(({ gate }) => gate);
  find("#order").hidden = !state.results.some(({ score }) => score !== null);
  if (find("[data-filter=gate]").hidden && state.filter === "gate") state.filter = "all";
  const before = state.shown.findIndex(({ name }) => name === state.chosen);
  state.shown = state.results.filter(FILTERS[state.filter]);
  if (find("#order").value === "lowest") {
    state.shown.sort((one, other) => (one.score ?? Infinity) - (other.score ?? Infinity) || 0);
  }
  const now = state.shown.findIndex(({ name }) => name === state.chosen);
  // What has left the list makes room for the one that was after it.
  const index = now >= 0 ? now : Math.min(Math.max(before, 0), state.shown.length - 1);
  for (const button of find("#filters").children) {
    const count = state.results.filter(FILTERS[button.dataset.filter]).length;
    button.querySelector("b").textContent = count;
    button.setAttribute("aria-checked", button.dataset.filter === state.filter);
  }
  choose(index);
}

function choose(index) {
  const item = state.shown[index];
  if (item?.name !== state.chosen) {
    state.number = 0;
    viewer.fit();
  }
  state.chosen = item?.name ?? null;
  list.show(state.shown, index);
  find("main").classList.toggle("nothing", !item);
  if (item) showResult(item, state.shown[index + 1]);
  else find("#empty").textContent = whyNothing();
}

function whyNothing() {
  if (state.catalogue === null) return words.noCatalogues;
  if (!state.etag) return ""; // it is being read
  if (!state.results.length) return words.noResults;
  return state.filter === "undecided" ? fill(words.allDecided, folderOf(state.catalogue)) : words.nothing;
}

const current = () => state.shown.find(({ name }) => name === state.chosen);

function move(steps) {
  const index = state.shown.findIndex(({ name }) => name === state.chosen);
  if (index >= 0) choose(Math.min(Math.max(index + steps, 0), state.shown.length - 1));
}

function fillRow(row, item) {
  if (!row.childElementCount) {
    row.className = "row";
    row.append(element("img"), element("span", "name"), element("span", "score"), element("i", "mark"));
    row.firstChild.loading = "lazy";
    row.firstChild.alt = "";
  }
  const [picture, name, score, mark] = row.children;
  load(picture, pictureAddress(item, { size: SMALL }));
  name.textContent = item.name;
  name.title = item.name;
  score.textContent = item.score === null ? "" : item.score.toFixed(2);
  const gate = item.gate === "rejected" ? "gate" : "";
  mark.className = `mark ${item.changed ? "changed" : item.decision || gate}`;
  mark.title = item.changed ? lapsed(item) : words[item.decision || gate || "undecided"];
}

const lapsed = ({ decision }) => words[decision === "accepted" ? "changedAccepted" : "changedRejected"];

function showResult(item, next) {
  const result = { number: state.number };
  load(find("#result .made"), pictureAddress(item, result));
  for (const role of ["content", "style"]) {
    load(find(`#${role} img`), pictureAddress(item, { of: role, size: LARGE }));
    find(`#${role} figcaption`).textContent = `${words[role]}: ${item[role]}`;
  }
  load(find("#result .photo img"), pictureAddress(item, { of: "content", size: LARGE }));
  find("#result figcaption").replaceChildren(...captionOf(item));
  find("#facts").replaceChildren(...factsOf(item));
  find("#accept").setAttribute("aria-pressed", standing(item) === "accepted");
  find("#reject").setAttribute("aria-pressed", standing(item) === "rejected");
  if (next) new Image().src = pictureAddress(next, { number: 0 }); // so that it is there when it is its turn
}

function load(picture, address) {
  if (picture.dataset.address === address && !picture.classList.contains("missing")) return;
  picture.dataset.address = address;
  picture.classList.remove("missing");
  picture.src = address;
}

function captionOf(item) {
  const parts = [element("strong", "", item.name)];
  if (item.retry_of) parts.push(element("span", "", fill(words.tryOf, item.retry_of)));
  for (let number = 0; item.pictures > 1 && number < item.pictures; number++) {
    const button = element("button", "quiet", String(number + 1));
    button.setAttribute("aria-pressed", number === state.number);
    button.addEventListener("click", () => {
      state.number = number;
      showResult(item);
    });
    parts.push(button);
  }
  return parts;
}

function factsOf(item) {
  const facts = Object.entries(item.scores).map(([name, value]) => fact(words[`${name}_score`] ?? name, value.toFixed(2)));
  for (const [name, value] of Object.entries(item.settings)) facts.push(fact(words[name] ?? name, String(value)));
  if (item.seconds !== null) facts.push(fact(words.seconds, `${item.seconds} s`));
  if (item.gate) {
    const verdict = fact(fill(words.byGate, words[item.gate]), item.gate === "rejected" ? item.gate_reason : "");
    verdict.classList.add(item.gate);
    facts.push(verdict);
  }
  if (item.decision) {
    const when = item.decided_at && new Date(item.decided_at).toLocaleString(document.documentElement.lang);
    const verdict = fact(fill(words.decided, words[item.decision], item.decided_by, when), item.decision_reason);
    verdict.classList.add(item.changed ? "lapsed" : item.decision);
    facts.push(verdict);
  }
  if (item.changed) facts.push(Object.assign(fact(lapsed(item), ""), { className: "fact changed" }));
  return facts;
}

function fact(name, value) {
  const shown = element("span", "fact");
  shown.append(element("em", "", name), " ", value);
  return shown;
}

function reasonsOf(items) {
  const counts = new Map();
  for (const { decision_reason: reason } of items) if (reason) counts.set(reason, (counts.get(reason) ?? 0) + 1);
  const counted = [...counts].sort(([, one], [, other]) => other - one).map(([reason, count]) => `${reason} ${count}`);
  return counted.length ? `(${counted.join(", ")})` : "";
}

// Two lines, since a wanted picture may take several tries: the second one counts as the filters do.
function showSummary(summary) {
  const rejected = state.results.filter(FILTERS.rejected);
  const wanted = [
    [words.wanted, summary.wanted],
    [words.first, summary.accepted_at_first_try],
    [words.later, summary.accepted_after_retries],
    [words.rejectedFor, summary.rejected, ""],
    [words.left, summary.undecided],
  ];
  const tries = [
    [words.tries, state.results.length],
    [words.gone, summary.pictures_made - state.results.length],
    [words.rejectedFor, rejected.length, reasonsOf(rejected)],
    [words.failed, summary.failed],
    [words.perPicture, summary.seconds_a_picture],
    [words.reused, summary.lora_uses - summary.loras],
  ];
  find("#wanted").replaceChildren(...counted(wanted));
  find("#tries").replaceChildren(...counted(tries));
  if (summary.wanted) {
    const numbers = { href: address("summary"), title: words.json };
    find("#tries").append(Object.assign(element("a", "", "JSON"), numbers));
  }
}

function counted(parts) {
  return parts.filter(([, value]) => value).map(([text, ...values]) => element("span", "", fill(text, ...values).trim()));
}

function say(text) {
  const message = find("#message");
  message.textContent = text;
  message.classList.add("said");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => message.classList.remove("said"), 5000);
}

// What the person does

// Whether the server took it.
async function decide(decision, reason = "") {
  const seen = current();
  if (!seen) return;
  const { complete, naturalWidth } = find("#result .made");
  if (!complete || !naturalWidth) return say(words.loading); // nobody has seen it
  const by = await nameOfPerson();
  if (!by) return;
  const item = current(); // `refresh` may have replaced the results while the name was asked for
  if (item?.version !== seen.version) return say(words.changed);
  state.undo.push({ name: item.name, decision: standing(item), decision_reason: standing(item) && item.decision_reason });
  const index = state.shown.indexOf(item);
  const isTaken = send(item, decision, reason, by);
  show();
  // In a filter that it has left, the next one is in its place already.
  if (state.shown[index]?.name === item.name) choose(Math.min(index + 1, state.shown.length - 1));
  return isTaken;
}

async function undo() {
  const last = state.undo.pop();
  const item = last && state.results.find(({ name }) => name === last.name);
  if (!item) return say(words.nothingToUndo);
  const by = await nameOfPerson();
  if (!by) return;
  send(item, last.decision, last.decision_reason, by);
  state.chosen = item.name;
  if (!FILTERS[state.filter](item)) state.filter = "all";
  show();
}

// Shows a decision at once and sends it; the page's word is taken back if the server does not take it.
function send(item, decision, reason, by) {
  const { name } = item;
  const before = Object.fromEntries(DECIDED.map((field) => [field, item[field]]));
  const decided = { decision, decision_reason: reason, decided_by: by, decided_at: new Date().toISOString(), changed: false };
  item.taken ??= before; // what the server has, also after several decisions that it does not take
  Object.assign(item, decided);
  const { catalogue } = state;
  setUnderWay(underWay + 1);
  posting = posting.then(async () => {
    let isTaken = true;
    try {
      const said = await post(address("decision"), { catalogue, name, version: item.version, decision, reason, by });
      Object.assign(item, { version: said.version, taken: decided });
    } catch (error) {
      isTaken = false;
      Object.assign(item, item.taken);
      say(`${name}: ${error.message}`);
      state.undo = state.undo.filter((one) => one.name !== name);
      state.chosen = name;
      state.etag = "";
      show();
    }
    setUnderWay(underWay - 1);
    await refresh().catch(() => {}); // `watch` tells it
    return isTaken;
  });
  return posting;
}

function setUnderWay(count) {
  underWay = count;
  document.body.dataset.saving = count;
}

window.addEventListener("beforeunload", (event) => {
  if (underWay) event.preventDefault(); // decisions would be lost
});

async function makeAgain(name = current()?.name) {
  if (!name) return;
  try {
    const { prompt, extra_data } = await ask(address("retry", { name }));
    await post("../prompt", { prompt, extra_data });
    say(fill(words.queued, name));
    showQueue().catch(() => {}); // `watch` tells it
  } catch (error) {
    say(`${name}: ${error.message}`);
  }
}

async function handOver() {
  const { catalogue } = state;
  const button = find("#handover");
  button.disabled = true;
  try {
    await posting; // what was decided last is copied too
    showHandover(folderOf(catalogue), await post(address("accepted"), { catalogue }));
  } catch (error) {
    say(error.message);
  }
  button.disabled = false;
}

const folderOf = (catalogue) => ["output", catalogue].filter(Boolean).join("/");

function showHandover(folder, { pictures, new: added, moved, left_out }) {
  const lines = [fill(words.copied, pictures, `${folder}/accepted`, added)];
  if (moved) lines.push(fill(words.movedAside, moved, `${folder}/accepted_earlier`));
  for (const [reason, names] of Object.entries(left_out)) {
    const shown = NAMED.has(reason) ? `: ${names.slice(0, 10).join(", ")}${names.length > 10 ? " ..." : ""}` : "";
    lines.push(fill(words.leftOut, names.length, words.leftOutFor[reason]) + shown);
  }
  find("#copied .lines").replaceChildren(...lines.map((line) => element("p", "", line)));
  find("#copied").showModal();
}

async function reject() {
  const item = current();
  if (!item) return;
  const reason = await chooseReason();
  const isAgain = find("#reasons .check input").checked;
  if (reason && (await decide("rejected", reason)) && isAgain) await makeAgain(item.name);
}

function chooseReason() {
  const dialog = find("#reasons");
  const input = dialog.querySelector("input");
  let reasons = kept(KEPT.reasons) ?? words.reasons;
  const draw = () => {
    dialog.querySelector("ol").replaceChildren(
      ...reasons.map((reason, index) => {
        const line = element("li");
        const take = element("button", "take", reason);
        const remove = element("button", "quiet", "×");
        take.prepend(element("kbd", "", index < 9 ? String(index + 1) : ""));
        take.type = remove.type = "button";
        remove.setAttribute("aria-label", `${words.removeReason}: ${reason}`);
        take.addEventListener("click", () => dialog.answer(reason));
        remove.addEventListener("click", () => {
          reasons = reasons.filter((one) => one !== reason);
          keep(KEPT.reasons, reasons);
          draw();
        });
        line.append(take, remove);
        return line;
      }),
    );
  };
  draw();
  const again = dialog.querySelector(".check input");
  input.value = "";
  again.checked = false;
  dialog.onkeydown = (event) => {
    const reason = reasons[Number(event.key) - 1];
    if (input.value || !reason && event.key !== "0") return;
    event.preventDefault();
    if (reason) dialog.answer(reason);
    else again.checked = !again.checked;
  };
  return opened(dialog, () => {
    const reason = input.value.trim();
    if (reason && !reasons.includes(reason)) keep(KEPT.reasons, [...reasons, reason]);
    return reason;
  });
}

async function nameOfPerson(anew = false) {
  if (kept(KEPT.name) && !anew) return kept(KEPT.name);
  const dialog = find("#name");
  const input = dialog.querySelector("input");
  input.value = kept(KEPT.name) ?? "";
  const name = await opened(dialog, () => input.value.trim());
  if (name) keep(KEPT.name, name);
  showName();
  return name;
}

// What a dialog gives; empty if it was cancelled. `dialog.answer` gives it at once: by the time of the event `close` the
// next key may have opened the dialog again.
function opened(dialog, valueOf) {
  return new Promise((answer) => {
    dialog.answer = (value) => {
      dialog.close();
      answer(value);
    };
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const value = valueOf();
      if (value) dialog.answer(value);
    };
    dialog.oncancel = () => answer("");
    dialog.querySelector(".cancel").onclick = () => dialog.answer("");
    dialog.showModal();
    dialog.querySelector("input").focus();
  });
}

function showName() {
  const name = kept(KEPT.name);
  find("#who").textContent = name ? fill(words.you, name) : words.who;
}

function kept(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function keep(key, value) {
  localStorage.setItem(key, JSON.stringify(value));
}

const KEYS = {
  ArrowRight: () => move(1),
  ArrowDown: () => move(1),
  ArrowLeft: () => move(-1),
  ArrowUp: () => move(-1),
  Home: () => move(-Infinity),
  End: () => move(Infinity),
  a: () => decide("accepted"),
  r: reject,
  u: undo,
  m: makeAgain,
  c: () => viewer.toggleCompare(),
  z: () => viewer.toggleZoom(),
  g: () => keep(KEPT.ground, viewer.changeGround()),
};
const REPEATED = /^Arrow/; // while a key is held down

document.addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const dialog = event.target.closest("dialog");
  const isTyping = dialog ? dialog.open : event.target.closest("select, input"); // a closed one has the focus for a frame
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, key)) return;
  event.preventDefault();
  if (!event.repeat || REPEATED.test(key)) KEYS[key]();
});

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

// The page

function nameParts() {
  document.title = `ConsisLoRA · ${words.title}`;
  const buttons = { accept: "A", reject: "R", undo: "U", again: "M", compare: "C", zoom: "Z", ground: "G" };
  for (const [id, key] of Object.entries(buttons)) {
    find(`#${id}`).append(words[id], " ", element("kbd", "", key));
    find(`#${id}`).addEventListener("click", (event) => {
      event.currentTarget.blur(); // so that the keys act on the page again
      KEYS[key.toLowerCase()]();
    });
  }
  for (const name of Object.keys(FILTERS)) {
    const button = element("button", "quiet", words[name]);
    button.dataset.filter = name;
    button.setAttribute("role", "radio");
    button.append(element("b"));
    button.addEventListener("click", () => {
      state.filter = name;
      button.blur();
      show();
    });
    find("#filters").append(button);
  }
  for (const name of ["lowest", "asMade"]) {
    find("#order").append(Object.assign(element("option", "", words[name]), { value: name }));
  }
  find("#order").value = kept(KEPT.order) ?? "lowest";
  find("#order").addEventListener("change", (event) => {
    keep(KEPT.order, event.target.value);
    event.target.blur();
    show();
  });
  find("#handover").textContent = find("#copied h2").textContent = words.handOver;
  find("#handover").addEventListener("click", handOver);
  find("#who").addEventListener("click", () => nameOfPerson(true));
  find("#list").setAttribute("aria-label", words.results);
  find("#slider").setAttribute("aria-label", words.slider);
  find("#reasons h2").textContent = words.why;
  find("#reasons label span").textContent = words.otherReason;
  find("#reasons .check span").textContent = words.rejectAgain;
  find("#name h2").textContent = words.who;
  find("#name p").textContent = words.whoLong;
  for (const button of document.querySelectorAll("dialog .cancel")) button.textContent = words.cancel;
  find("#reasons .go").textContent = words.reject;
  find("#name .go").textContent = words.save;
  find("#copied .go").textContent = words.close;
  for (const picture of document.querySelectorAll("#viewer img")) {
    picture.addEventListener("error", () => picture.classList.add("missing"));
  }
  for (const stage of document.querySelectorAll(".stage")) stage.dataset.missing = words.missing;
  find("#filters").title = words.countsTries;
  find("#catalogue").addEventListener("change", ({ target }) => {
    target.blur();
    open(target.value).catch((error) => say(error.message));
  });
  window.addEventListener("focus", () => findCatalogues().catch(() => {})); // `watch` tells it
  find("#ground").title = words.grounds;
  viewer.layOn(kept(KEPT.ground));
  showName();
}

async function findCatalogues() {
  const names = await ask("review/catalogues");
  const choice = find("#catalogue");
  if (names.join("\n") !== Array.from(choice.options, ({ value }) => value).join("\n") || !names.length) {
    choice.replaceChildren(...names.map((name) => Object.assign(element("option", "", name || "output"), { value: name })));
  }
  const wanted = state.catalogue ?? new URLSearchParams(location.search).get("catalogue");
  const catalogue = names.includes(wanted) ? wanted : (names[0] ?? null);
  choice.value = catalogue ?? "";
  if (catalogue === null) show();
  else if (catalogue !== state.catalogue) await open(catalogue);
}

function open(catalogue) {
  Object.assign(state, { catalogue, etag: "", results: [], chosen: null, undo: [] });
  find("#handover").title = fill(words.handOverLong, folderOf(catalogue));
  history.replaceState(null, "", `?${new URLSearchParams({ catalogue })}`);
  show();
  return refresh();
}

nameParts();
watch();
