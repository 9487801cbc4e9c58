"use strict";
// The key stands behind # in the address that the server has shown when it was started.
const key = remembered("key");
const EVERY_SECONDS = 5;

refresh();

async function refresh() {
  try {
    const answer = await fetch("/results/data", { headers: { ...authorization(), "Results-Key": key } });
    show(await (await checked(answer)).json());
    say("");
  } catch (error) {
    say(error.message);
  }
  setTimeout(refresh, 1000 * EVERY_SECONDS);
}

function show({ models, evaluators, scales, votes, groups }) {
  $("lead").textContent = `${votes} votes of ${evaluators.length} ${evaluators.length === 1 ? "evaluator" : "evaluators"} on ${groups} groups. Lines: 95 % intervals over evaluators and groups.`;
  const figures = [["best", "Chosen as the best", 1], ...Object.entries(scales).map(([name, highest]) => [name, `${name[0].toUpperCase()}${name.slice(1)}, 1 to ${highest}`, highest])];
  $("panels").replaceChildren(...figures.map(([name, title, highest]) => panel(name, title, highest, Object.entries(models))));
  const columns = ["Evaluator", "Votes", "Median s", "Whole picture found", "Same best again", "Overall differs by"];
  const rows = evaluators.map((one) => [
    one.evaluator, one.votes, one.seconds.toFixed(1), `${one.planted_right} of ${one.planted}`, `${one.repeated_alike} of ${one.repeated}`,
    one.repeated_difference === null ? "" : one.repeated_difference.toFixed(2),
  ]);
  $("evaluators").replaceChildren(line("th", columns), ...rows.map((row) => line("td", row)));
  $("evaluators").hidden = !evaluators.length;
}

function panel(name, title, highest, models) {
  const section = element("section", "panel");
  section.append(element("h2", "", title));
  const lowest = name === "best" ? 0 : 1;
  const place = (value) => (100 * (value - lowest)) / (highest - lowest);
  for (const [model, figures] of models) {
    const { value, low, high } = figures[name];
    const words = element("div");
    words.append(element("span", "", model), element("b", "", name === "best" ? `${(100 * value).toFixed(1)} %` : value.toFixed(2)));
    const track = element("div", "track");
    const [bar, whisker] = [element("i"), element("u")];
    bar.style.width = `${place(value)}%`;
    whisker.style.left = `${place(low)}%`;
    whisker.style.width = `${place(high) - place(low)}%`;
    track.append(bar, whisker);
    const row = element("div", "row");
    row.append(words, track);
    section.append(row);
  }
  return section;
}

function line(kind, values) {
  const row = document.createElement("tr");
  row.append(...values.map((value) => element(kind, "", String(value))));
  return row;
}

function element(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}
