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
  const cards = new Map();  // what is seen, by its number: all that was asked about it
  const rows = data.rows.map(([run, id, type, question, answer, prediction, state, p, media, also, seen, cell]) => {
    const text = [id, question, answer, prediction ?? "", ...also].join("\n").toLowerCase();
    const row = {run, id, type, question, answer, prediction, state, p, media, also, seen, cell, text};
    if (!cards.has(seen)) cards.set(seen, []);
    cards.get(seen).push(row);
    return row;
  });
  const number = n => n.toLocaleString("en");
  let found = rows, page = 0, cell = "";

  // Texts become text nodes alone: whatever the data hold, they are shown, never run.
  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  }

  function medium([kind, src, name]) {
    const element = make(kind === "sound" ? "audio" : "img");
    element.title = name;
    element.src = src;
    if (kind === "sound") {
      element.controls = true;
      element.preload = "none";
      element.setAttribute("aria-label", name);
      return element;
    }
    element.alt = name;
    const button = make("button", "picture", element);
    button.type = "button";
    button.addEventListener("click", () => {
      const large = make("dialog", "large", element.cloneNode());
      large.addEventListener("click", () => large.close());
      large.addEventListener("close", () => large.remove());
      document.body.append(large);
      large.showModal();
    });
    return button;
  }

  // A clip or scan with what was asked about it: wrong answers first; those that are not chosen are folded.
  function card(seen) {
    const all = cards.get(seen), others = all.filter(row => !row.chosen);
    const chosen = all.filter(row => row.chosen).sort((a, b) => (b.state > 1) - (a.state > 1));
    const pictures = [...new Set(all.flatMap(row => row.media))].map(i => media[i]).filter(([kind]) => kind !== "sound");
    const article = make("article", "card", ...pictures.map(medium));
    if (pictures.length) article.append(make("div", "name", pictures.map(([, , name]) => name).join(", ")));
    article.append(...chosen.map(asked));
    if (others.length) {
      const text = `other answers: ${others.length} (${others.filter(row => row.state === 0).length} right)`;
      article.append(make("details", "", make("summary", "", text), ...others.map(asked)));
    }
    return article;
  }

  function asked(row) {
    const list = make("dl");
    const add = (name, text, kind) => {
      const shown = make("dd", kind, text);
      shown.dir = "auto";
      list.append(make("dt", "", name), shown);
    };
    if (row.question) add("question", row.question);
    add("answer", row.answer);
    if (row.state && row.also.length) add("or", row.also.join("\n"), "quiet");
    const said = row.prediction === null ? "nothing" : row.prediction.trim() ? row.prediction : "an empty text";
    if (row.state || said !== row.answer) add("prediction", said, said === row.prediction ? "" : "quiet");
    const marks = ["✓", "≈", "✗", "✗"];
    const result = `${marks[row.state]} ${data.states[row.state]}`;
    const foot = make("footer", "", make("span", `badge state${row.state}`, result));
    if (row.p !== null) foot.append(make("span", "", `p ${row.p.toFixed(3)}`));
    foot.append(make("span", "", data.types[row.type]), make("span", "", row.id));
    if (data.runs.length > 1) foot.append(make("span", "", data.runs[row.run]));
    const sounds = row.media.map(i => media[i]).filter(([kind]) => kind === "sound");
    return make("div", "asked", ...sounds.map(medium), list, foot);
  }

  function show() {
    const seen = [...new Set(found.map(row => row.seen))], pages = Math.max(1, Math.ceil(seen.length / data.size));
    page = Math.min(Math.max(page, 0), pages - 1);
    id("cards").replaceChildren(...seen.slice(page * data.size, (page + 1) * data.size).map(card));
    id("count").textContent = `${number(found.length)} of ${number(rows.length)}`;
    const position = `page ${number(page + 1)} of ${number(pages)}`, shown = id("cards").childElementCount;
    id("printed").textContent = `${position}: ${number(shown)} of ${number(seen.length)} cards`;
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
    for (const row of rows) {
      row.chosen = (run === "" || row.run === Number(run)) && (type === "" || row.type === Number(type))
        && (states[0] === "" || states.includes(String(row.state))) && row.text.includes(text)
        && (cell === "" || row.cell === Number(cell));
    }
    found = rows.filter(row => row.chosen);
    if (order) found.sort((a, b) => (a.p === null) - (b.p === null) || order * (a.p - b.p));  // without p: last
    page = 0;
    show();
  }

  // Only the answers of a cell of a confusion table, until its button is clicked or something else is chosen.
  function chooseCell(chosen, title) {
    cell = chosen;
    id("cell").hidden = cell === "";
    id("cell").textContent = `${title} ×`;
    choose();
  }

  document.querySelector(".controls").addEventListener("input", () => chooseCell("", ""));
  document.querySelector(".controls").addEventListener("submit", event => event.preventDefault());
  id("cell").addEventListener("click", () => chooseCell("", ""));
  document.addEventListener("click", event => {
    const link = event.target.closest("a[data-type]");
    if (!link) return;
    if (id("run")) id("run").value = link.dataset.run;
    id("type").value = data.types.indexOf(link.dataset.type);
    id("result").value = link.dataset.cell ? "" : "2 3";
    id("search").value = "";
    chooseCell(link.dataset.cell, link.title);
    if (found.length) return;
    id("result").value = "";  // nothing of it is wrong
    choose();
  });
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
