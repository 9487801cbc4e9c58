"use strict";
// What every page of ours does: it asks its own server, with the token where there is one, and says what went wrong.
// Everything that comes from outside is put in as text (textContent) or as a data: picture, never as HTML.

const $ = (id) => document.getElementById(id);
const token = remembered("token");

async function ask(path) {
  return (await checked(await fetch(path, { headers: authorization() }))).json();
}

async function send(path, body, type, headers = {}, signal = undefined) {
  return checked(await fetch(path, { method: "POST", body, signal, headers: { ...headers, ...authorization(), "Content-Type": type } }));
}

async function checked(answer) {
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const error = new Error((content.error || `the server answered ${answer.status}`) + (wait ? ` (in about ${wait} s)` : ""));
  throw Object.assign(error, { status: answer.status });
}

// A secret stands behind # in the address, which no browser sends; it is kept for this tab alone.
function remembered(name) {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get(name)) {
    sessionStorage.setItem(name, given.get(name));
    given.delete(name);
    const rest = given.toString();
    history.replaceState(null, "", location.pathname + (rest ? `#${rest}` : ""));
  }
  return sessionStorage.getItem(name) || "";
}

function authorization() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function dataUrl(png) {
  return `data:image/png;base64,${png}`;
}

function say(sentence) {
  $("message").textContent = sentence;
  $("message").hidden = !sentence;
}
