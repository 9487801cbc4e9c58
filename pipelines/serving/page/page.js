"use strict";
let about = null;
let running = null;

start();

async function start() {
  try {
    about = await ask("/about");
  } catch (error) {
    $("about").textContent = "";
    return say(error.message);
  }
  const skills = ["draws", about.can.rank && "ranks its pictures", about.can.magnify && "enlarges", about.can.caption && "captions", about.can.complete && "completes"];
  $("about").textContent = `${about.image_size} × ${about.image_size} pixels · ${skills.filter(Boolean).join(", ")}`;
  $("prompt").maxLength = about.max_prompt;
  $("candidates").max = about.max_candidates;
  $("candidates").value = Math.min(4, about.max_candidates);
  $("temperature").value = about.temperature;
  $("top_k").max = about.num_codes;
  $("top_k").value = about.top_k;
  $("describe").hidden = !about.can.caption;
  $("complete").hidden = !about.can.complete;
  $("draw").disabled = false;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running && running.abort());

async function draw() {
  if (running || !about) return;
  const prompt = $("prompt").value.trim();
  const order = {
    prompt,
    candidates: $("candidates").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    top_k: $("top_k").valueAsNumber,
  };
  if ($("seed").value !== "") order.seed = $("seed").valueAsNumber;
  const group = newGroup(prompt, order.candidates);
  running = new AbortController();
  say("");
  setRunning(true);
  try {
    const answer = await send("/draw", JSON.stringify(order), "application/json", { Accept: "text/event-stream" }, running.signal);
    for await (const [name, value] of events(answer)) {
      if (name === "queued") group.seeds(value.seeds);
      if (name === "rows") group.rows(value);
      if (name === "done") group.done(value.pictures);
      if (name === "failed") throw new Error(value.error);
    }
    if (!group.isDone) throw new Error("the server ended before the pictures were done");
  } catch (error) {
    group.remove();
    if (error.name !== "AbortError") say(error.message);
  } finally {
    running = null;
    setRunning(false);
  }
}

function setRunning(isRunning) {
  $("draw").disabled = isRunning;
  $("draw").textContent = isRunning ? "Drawing…" : "Draw";
  $("stop").hidden = !isRunning;
}

// One prompt's pictures: empty frames first, then their upper rows, then the pictures in the order of their rank.
function newGroup(prompt, number) {
  const section = $("group").content.firstElementChild.cloneNode(true);
  section.querySelector("h2").textContent = prompt;
  const place = section.querySelector(".pictures");
  const cards = Array.from({ length: number }, () => $("card").content.firstElementChild.cloneNode(true));
  for (const card of cards) card.classList.add("busy");
  place.append(...cards);
  $("gallery").prepend(section);
  return {
    isDone: false,
    remove: () => section.remove(),
    seeds: (seeds) => cards.forEach((card, n) => { card.querySelector(".seed").textContent = `seed ${seeds[n]}`; }),
    rows: ({ pngs }) => cards.forEach((card, n) => { card.querySelector("img").src = dataUrl(pngs[n]); }),
    done(pictures) {
      pictures.forEach((picture, n) => finish(cards[n], picture, prompt, pictures.length));
      if (pictures.every((picture) => picture.rank !== null)) {
        place.append(...pictures.map((picture, n) => [picture.rank, cards[n]]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]));
      }
      this.isDone = true;
    },
  };
}

function finish(card, picture, prompt, number) {
  const part = (name) => card.querySelector(name);
  card.classList.remove("busy");
  part("img").alt = prompt;
  part("img").classList.toggle("fine", about.image_size > 128);
  part(".seed").addEventListener("click", () => { $("seed").value = picture.seed; });
  if (picture.rank !== null && number > 1) {
    card.classList.toggle("best", picture.rank === 0);
    part(".rank").hidden = false;
    part(".rank").textContent = picture.rank === 0 ? "best" : `${picture.rank + 1}.`;
    part(".rank").title = `CapLoss ${picture.cap_loss.toFixed(3)}: the lower, the likelier the captioner finds your words for it`;
  }
  show(card, picture, prompt, "");
  part(".actions").hidden = false;
  part(".magnify").hidden = !about.can.magnify;
  part(".caption").hidden = !about.can.caption;
  whileBusy(part(".magnify"), async () => {
    const body = JSON.stringify({ prompt, codes: picture.codes, seed: picture.seed });
    const answer = await (await send("/magnify", body, "application/json")).json();
    show(card, answer, prompt, "_large");
    part("img").classList.add("fine");
    return true;
  });
  whileBusy(part(".caption"), async () => {
    const answer = await send("/caption", bytesOf(picture.png), "image/png");
    part(".words").textContent = captionLines(await answer.json());
    part(".words").hidden = false;
    return true;
  });
}

function show(card, picture, prompt, suffix) {
  const save = card.querySelector(".save");
  card.querySelector("img").src = save.href = dataUrl(picture.png);
  const words = prompt.replace(/[^\p{L}\p{N}]+/gu, "_").replace(/^_+|_+$/g, "").slice(0, 60) || "picture";
  save.download = `${words}_seed_${picture.seed}${suffix}.png`;
}

// A button that works once: it is off while its work lasts, and stays off when that succeeded.
function whileBusy(button, work) {
  button.addEventListener("click", async () => {
    button.disabled = true;
    say("");
    try {
      button.disabled = await work();
    } catch (error) {
      button.disabled = false;
      say(error.message);
    }
  });
}

const drop = $("drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) describe(event.dataTransfer.files[0]);
  });
}
drop.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && $("file").click());
$("file").addEventListener("change", () => $("file").files.length && describe($("file").files[0]));

async function describe(file) {
  say("");
  URL.revokeObjectURL($("given").src);
  $("given").src = URL.createObjectURL(file);
  $("given").hidden = false;
  $("invitation").hidden = true;
  $("captions").textContent = "…";
  try {
    $("captions").textContent = captionLines(await (await send("/caption", file, file.type || "image/png")).json());
  } catch (error) {
    $("captions").textContent = "";
    say(error.message);
  }
}

const captionLines = ({ captions }) => Object.values(captions).join("\n");

// Server-sent events of an answer, as [name, value].
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [name, data] = part.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

function bytesOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
