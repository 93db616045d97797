// Sorting by a column and a filter for long tables; the page says all it has to say without them.
"use strict";
for (const table of document.querySelectorAll("table:not(.map)")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim().replaceAll(",", "");
    const number = Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.className = "sort";
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1));
      if (down) rows.reverse();
      body.append(...rows.map(([, row]) => row));
    });
  }
  if (body.rows.length < 20) continue;
  const input = document.createElement("input");
  input.className = "filter";
  input.type = "search";
  input.placeholder = "filter rows";
  input.setAttribute("aria-label", `Filter the rows of: ${table.caption.textContent}`);
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  table.parentElement.before(input);
}

// What marks say on hover, at once and on focus too.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("role", "tooltip");
document.body.append(tip);
for (const title of document.querySelectorAll("svg :not(svg) > title")) {
  const mark = title.parentElement;
  mark.dataset.said = title.textContent;
  title.remove();
  mark.setAttribute("aria-label", mark.dataset.said);
}
for (const cell of document.querySelectorAll("td[title]")) {
  cell.dataset.said = cell.title;
  cell.setAttribute("aria-description", cell.title);
  cell.removeAttribute("title");
}
const show = (target, x, y) => {
  const mark = target.closest?.("[data-said]") ?? target.querySelector?.("[data-said]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.said;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
};
document.addEventListener("pointermove", (event) => {
  if (event.target.closest?.("[data-said]")) show(event.target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const box = event.target.getBoundingClientRect();
  if (event.target.matches("svg a")) show(event.target, box.left, box.bottom);
  else tip.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
});
