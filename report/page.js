"use strict";
(() => {
  // What is folded is printed, too.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach(details => details.open = true);
  });
  addEventListener("afterprint", () => folded.forEach(details => details.open = false));

  const id = name => document.getElementById(name);
  if (!id("gallery-data")) return;
  const data = JSON.parse(id("gallery-data").textContent);
  const media = JSON.parse(id("gallery-media").textContent);
  const rows = data.rows.map(([run, id, type, question, answer, prediction, state, p, media, also]) => {
    const text = [id, question, answer, prediction ?? "", ...also].join("\n").toLowerCase();
    return {run, id, type, question, answer, prediction, state, p, media, also, text};
  });
  const number = n => n.toLocaleString("en");
  let found = rows, page = 0;

  // Texts become text nodes alone: whatever the data hold, they are shown, never run.
  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  }

  function medium([kind, src, name]) {
    const element = document.createElement(kind === "sound" ? "audio" : "img");
    element.title = name;
    if (kind === "sound") {
      element.controls = true;
      element.preload = "none";
      element.setAttribute("aria-label", name);
    } else {
      element.alt = name;
    }
    element.src = src;
    return element;
  }

  function card(row) {
    const list = make("dl");
    const add = (name, text, kind) => {
      const shown = make("dd", kind, text);
      shown.dir = "auto";
      list.append(make("dt", "", name), shown);
    };
    if (row.question) add("question", row.question);
    add("answer", row.answer);
    if (row.also.length) add("or", row.also.join("\n"), "quiet");
    add("prediction", row.prediction === null ? "nothing" : row.prediction.trim() ? row.prediction : "an empty text",
      row.prediction && row.prediction.trim() ? "" : "quiet");
    const marks = ["✓", "≈", "✗", "✗"];
    const result = `${marks[row.state]} ${data.states[row.state]}`;
    const foot = make("footer", "", make("span", `badge state${row.state}`, result));
    if (row.p !== null) foot.append(make("span", "", `p ${row.p.toFixed(3)}`));
    foot.append(make("span", "", data.types[row.type]), make("span", "", row.id));
    if (data.runs.length > 1) foot.append(make("span", "", data.runs[row.run]));
    const shown = row.media.length ? [make("div", "media", ...row.media.map(i => medium(media[i])))] : [];
    return make("article", "card", ...shown, list, foot);
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / data.size));
    page = Math.min(Math.max(page, 0), pages - 1);
    id("cards").replaceChildren(...found.slice(page * data.size, (page + 1) * data.size).map(card));
    id("count").textContent = `${number(found.length)} of ${number(rows.length)}`;
    const position = `page ${number(page + 1)} of ${number(pages)}`, shown = id("cards").childElementCount;
    id("printed").textContent = `${position}: ${number(shown)} of ${number(found.length)} predictions`;
    for (const pager of document.querySelectorAll(".pager")) {
      const [previous, place, next] = pager.children;
      place.textContent = position;
      previous.disabled = page === 0;
      next.disabled = page === pages - 1;
    }
  }

  function choose() {
    const value = name => id(name) ? id(name).value : "";
    const run = value("run"), type = value("type"), states = value("result").split(" ");
    const text = id("search").value.trim().toLowerCase(), order = Number(value("order"));
    found = rows.filter(row => (run === "" || row.run === Number(run)) && (type === "" || row.type === Number(type))
      && (states[0] === "" || states.includes(String(row.state))) && row.text.includes(text));
    if (order) found.sort((a, b) => (a.p === null) - (b.p === null) || order * (a.p - b.p));  // without p: last
    page = 0;
    show();
  }

  document.querySelector(".controls").addEventListener("input", choose);
  document.querySelector(".controls").addEventListener("submit", event => event.preventDefault());
  for (const button of document.querySelectorAll(".pager button")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.turn);
      show();
      // A disabled button loses the focus: the other one takes it.
      if (button.disabled) button.parentElement.querySelector("button:enabled").focus();
      if (id("cards").getBoundingClientRect().top < 0) id("gallery").scrollIntoView();
    });
  }
  choose();
  // Back may fill in the form once more, after this has run; a page that was kept is as it was left.
  addEventListener("pageshow", event => event.persisted || choose());
})();
