"use strict";
let about = null;
let me = null; // name, code, done, total
let ballot = null; // place, caption, pictures
let cards = [];
let at = { card: 0, scale: 0 }; // where a digit goes
let since = 0;
const WAITS = [1, 2, 4, 5]; // seconds before a request that got no answer is sent again

start();

async function start() {
  try {
    about = await ask("/about");
    const known = JSON.parse(localStorage.getItem("evaluator") || "null");
    if (!known) return showJoin();
    me = known;
    await advance();
  } catch (error) {
    say(error.message);
    showJoin();
  }
}

function showJoin() {
  $("join").hidden = false;
  $("ballot").hidden = $("foot").hidden = $("done").hidden = $("bar").hidden = $("who").hidden = true;
  $("name").focus();
}

$("join").addEventListener("submit", async (event) => {
  event.preventDefault();
  say("");
  $("begin").disabled = true;
  try {
    me = await post("/join", { name: $("name").value, code: $("code").value.trim() });
    localStorage.setItem("evaluator", JSON.stringify({ name: me.name, code: me.code }));
    $("join").hidden = true;
    await advance();
  } catch (error) {
    say(error.message);
  } finally {
    $("begin").disabled = false;
  }
});

// The next group, or the end.
async function advance() {
  const content = await post("/ballot", { name: me.name, code: me.code });
  me = { name: content.name, code: content.code, done: content.done, total: content.total };
  showWho();
  const isOver = content.pictures === undefined;
  $("ballot").hidden = $("foot").hidden = isOver;
  $("done").hidden = !isOver;
  if (isOver) {
    $("thanks").textContent = `You have judged ${me.total} groups. Your votes are saved; you can close this page.`;
    return;
  }
  ballot = content;
  showBallot();
}

function showWho() {
  const other = document.createElement("button");
  other.type = "button";
  other.textContent = "not you?";
  other.addEventListener("click", () => {
    localStorage.removeItem("evaluator");
    location.reload();
  });
  $("who").replaceChildren(`${me.name} · code ${me.code} (goes on from any device) · `, other);
  $("who").hidden = $("bar").hidden = false;
  $("bar").setAttribute("aria-valuemax", me.total);
  $("bar").setAttribute("aria-valuenow", me.done);
  $("bar").firstElementChild.style.width = `${(100 * me.done) / me.total}%`;
}

function showBallot() {
  $("place").textContent = `Group ${ballot.place + 1} of ${me.total}`;
  $("caption").textContent = ballot.caption;
  cards = ballot.pictures.map((png, number) => newCard(png, number));
  $("pictures").replaceChildren(...cards.map((card) => card.element));
  const draft = readDraft();
  if (draft) draft.scores.forEach((scores, number) => Object.assign(cards[number].scores, scores));
  choose(draft ? draft.best : null);
  cards.forEach((card) => card.show());
  move(0, 0);
  scrollTo(0, 0);
  since = performance.now();
  refresh();
}

function newCard(png, number) {
  const element = $("card").content.firstElementChild.cloneNode(true);
  const letter = String.fromCharCode(65 + number);
  const image = element.querySelector("img");
  image.src = dataUrl(png);
  image.alt = `Picture ${letter}`;
  image.addEventListener("load", () => element.classList.toggle("small", image.naturalWidth <= 128));
  element.querySelector(".letter").textContent = letter;
  element.querySelector(".frame").addEventListener("click", () => enlarge(number));
  element.querySelector(".best").addEventListener("click", () => { choose(number); move(number, at.scale); refresh(); });
  const scores = {};
  const fields = Object.entries(about.scales).map(([scale, highest], place) => newScale(scale, highest, number, place, scores));
  element.querySelector(".scales").append(...fields);
  const show = () => {
    for (const [scale, value] of Object.entries(scores)) element.querySelector(`input[name="${scale}-${number}"][value="${value}"]`).checked = true;
  };
  return { element, scores, fields, show, image };
}

function newScale(scale, highest, number, place, scores) {
  const field = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.textContent = scale[0].toUpperCase() + scale.slice(1);
  const steps = document.createElement("div");
  steps.className = "steps";
  for (let value = 1; value <= highest; value += 1) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = `${scale}-${number}`;
    input.value = value;
    input.addEventListener("change", () => { scores[scale] = value; move(number, place); refresh(); });
    label.append(input, String(value));
    steps.append(label);
  }
  field.append(legend, steps);
  return field;
}

function choose(number) {
  cards.forEach((card, place) => {
    card.element.classList.toggle("chosen", place === number);
    card.element.querySelector(".best").setAttribute("aria-pressed", String(place === number));
  });
  ballot.best = number;
}

function move(card, scale) {
  at = { card, scale };
  cards.forEach((other, place) => {
    other.element.classList.toggle("current", place === card);
    other.fields.forEach((field, line) => field.classList.toggle("now", place === card && line === scale));
  });
}

function refresh() {
  const scales = Object.keys(about.scales);
  const missing = cards.reduce((sum, card) => sum + scales.filter((scale) => !card.scores[scale]).length, 0);
  const words = [missing && `${missing} ${missing === 1 ? "score" : "scores"}`, ballot.best === null && "the best one"].filter(Boolean);
  $("missing").textContent = words.length ? `Missing: ${words.join(" and ")}` : "Complete";
  $("next").disabled = words.length > 0;
  localStorage.setItem("draft", JSON.stringify({ name: me.name, place: ballot.place, best: ballot.best, scores: cards.map((card) => card.scores) }));
}

// What was filled in before the page was closed.
function readDraft() {
  const draft = JSON.parse(localStorage.getItem("draft") || "null");
  return draft && draft.name === me.name && draft.place === ballot.place && draft.scores.length === ballot.pictures.length ? draft : null;
}

$("next").addEventListener("click", vote);

async function vote() {
  if ($("next").disabled) return;
  $("next").disabled = true;
  const seconds = Math.min(Math.round(performance.now() - since) / 1000, 86400);
  const scores = cards.map((card) => card.scores);
  try {
    await post("/vote", { name: me.name, code: me.code, place: ballot.place, best: ballot.best, scores, seconds });
    localStorage.removeItem("draft");
    await advance();
  } catch (error) {
    $("next").disabled = false;
    if (error.status === 409) await advance(); // judged in another tab or on another device
    say(error.message);
  }
}

// Sent again until there is an answer: a vote that the server has counts once, however often it comes.
async function post(path, content) {
  for (let tries = 0; ; tries += 1) {
    let answer;
    try {
      answer = await fetch(path, { method: "POST", body: JSON.stringify(content), headers: { ...authorization(), "Content-Type": "application/json" } });
    } catch {
      say("The server does not answer. Nothing is lost: this is sent again by itself.");
      await new Promise((resolve) => setTimeout(resolve, 1000 * WAITS[Math.min(tries, WAITS.length - 1)]));
      continue;
    }
    say("");
    return (await checked(answer)).json();
  }
}

document.addEventListener("keydown", (event) => {
  if ($("ballot").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("large").open) return event.key.toLowerCase() === "z" && $("large").close();
  const isRadio = event.target.type === "radio";
  const scales = Object.entries(about.scales);
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (/^[0-9]$/.test(event.key)) {
    const [scale, highest] = scales[at.scale];
    const value = Number(event.key) || 10;
    if (value > highest) return;
    cards[at.card].scores[scale] = value;
    cards[at.card].show();
    const isLast = at.scale === scales.length - 1;
    const following = Math.min(at.card + 1, cards.length - 1);
    move(isLast ? following : at.card, isLast && at.card === following ? at.scale : (at.scale + 1) % scales.length);
    cards[at.card].element.scrollIntoView({ block: "nearest" });
    refresh();
  } else if (event.key.toLowerCase() === "b") {
    choose(at.card);
    refresh();
  } else if (event.key.toLowerCase() === "z") {
    enlarge(at.card);
  } else if (event.key === "Enter" && !event.target.closest("button")) {
    vote();
  } else if (steps && !isRadio) {
    move((at.card + steps[0] + cards.length) % cards.length, (at.scale + steps[1] + scales.length) % scales.length);
    cards[at.card].element.scrollIntoView({ block: "nearest" });
  } else {
    return;
  }
  event.preventDefault();
});

function enlarge(number) {
  const shown = $("large").querySelector("img");
  shown.src = cards[number].image.src;
  shown.alt = cards[number].image.alt;
  $("large").classList.toggle("small", cards[number].element.classList.contains("small"));
  $("large").showModal();
}
$("large").addEventListener("click", () => $("large").close());
