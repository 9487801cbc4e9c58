"use strict";
// Completing a picture: a box drawn over it, words, and a slider between before and after. What is shared is in page.js.

let photo = null;
let box = null; // top, left, bottom and right in shares of the picture
let corner = null;

const choose = $("choose");
for (const name of ["dragover", "dragleave", "drop"]) {
  choose.addEventListener(name, (event) => {
    event.preventDefault();
    choose.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) edit(event.dataTransfer.files[0]);
  });
}
choose.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && $("photo").click());
$("photo").addEventListener("change", () => $("photo").files.length && edit($("photo").files[0]));
$("other").addEventListener("click", () => {
  $("editor").hidden = true;
  choose.hidden = false;
  $("photo").value = "";
});

async function edit(file) {
  say("");
  URL.revokeObjectURL($("before").src);
  $("before").src = URL.createObjectURL(file);
  try {
    await $("before").decode();
  } catch {
    return say("this file is no picture that the browser can show; choose another");
  }
  photo = file;
  $("before").classList.toggle("coarse", $("before").naturalWidth <= 128);
  $("after").classList.toggle("coarse", $("before").naturalWidth <= 128);
  choose.hidden = true;
  $("editor").hidden = false;
  mark(null);
  showAfter("");
}

function place(event) {
  const frame = $("before").getBoundingClientRect();
  const share = (value) => Math.min(1, Math.max(0, value));
  return [share((event.clientY - frame.top) / frame.height), share((event.clientX - frame.left) / frame.width)];
}

$("canvas").addEventListener("pointerdown", (event) => {
  event.preventDefault();
  $("canvas").setPointerCapture(event.pointerId);
  corner = place(event);
  showAfter("");
  mark(null);
});
$("canvas").addEventListener("pointermove", (event) => {
  if (!corner) return;
  const [y, x] = place(event);
  const drawn = [Math.min(y, corner[0]), Math.min(x, corner[1]), Math.max(y, corner[0]), Math.max(x, corner[1])];
  mark(drawn[0] < drawn[2] && drawn[1] < drawn[3] ? drawn : null);
});
for (const name of ["pointerup", "pointercancel"]) $("canvas").addEventListener(name, () => { corner = null; });

function mark(drawn) {
  box = drawn;
  $("box").hidden = !box;
  $("fill").disabled = !box;
  if (!box) return;
  const [top, left, bottom, right] = box.map((share) => 100 * share);
  Object.assign($("box").style, { top: `${top}%`, left: `${left}%`, width: `${right - left}%`, height: `${bottom - top}%` });
}

function showAfter(png) {
  $("after").hidden = $("compare").hidden = $("take").hidden = !png;
  if (!png) return;
  $("after").src = $("take").href = dataUrl(png);
  $("share").value = 100;
  divide();
}

function divide() {
  $("after").style.clipPath = `inset(0 ${100 - $("share").value}% 0 0)`;
  $("box").hidden = Number($("share").value) > 0;
}
$("share").addEventListener("input", divide);

$("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!box || !photo || $("fill").disabled) return;
  const order = { prompt: $("wish").value.trim(), box };
  if ($("complete_seed").value !== "") order.seed = $("complete_seed").valueAsNumber;
  const ascii = JSON.stringify(order).replace(/[^ -~]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
  say("");
  $("fill").disabled = true;
  $("canvas").classList.add("busy");
  try {
    const answer = await (await send("/complete", photo, photo.type || "image/png", { "X-Order": ascii })).json();
    showAfter(answer.png);
    $("complete_seed").placeholder = `any (last ${answer.seed})`;
  } catch (error) {
    say(error.message);
  } finally {
    $("fill").disabled = !box;
    $("canvas").classList.remove("busy");
  }
});
