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
  if (body.rows.length < 12) continue;
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
