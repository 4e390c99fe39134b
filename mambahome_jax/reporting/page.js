"use strict";
(() => {
  const collator = new Intl.Collator(undefined, { numeric: true });
  const status = document.getElementById("status");
  const number = (cell) => {
    const text = cell.dataset.value;
    return text === undefined ? null : text === "" ? NaN : Number(text);
  };
  const compare = (a, b, direction) => {
    const x = number(a), y = number(b);
    if (x === null || y === null) return direction * collator.compare(a.textContent, b.textContent);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return direction * (x - y);
  };
  const sort = (head, order) => {
    const table = head.closest("table"), column = head.cellIndex, direction = order === "ascending" ? 1 : -1;
    for (const other of head.parentElement.cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", other === head ? order : "none");
    }
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => compare(a.cells[column], b.cells[column], direction));
    table.tBodies[0].append(...rows);
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      sort(head, order);
      status.textContent = "Sorted by " + button.textContent + ", " + order;
    });
  }
  const table = document.getElementById("cases"), select = document.getElementById("metric");
  if (select === null) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  let shown = data[select.value];
  select.addEventListener("change", () => {
    const metric = data[select.value];
    for (const row of table.tBodies[0].rows) {
      metric.values[Number(row.dataset.row)].forEach((value, position) => {
        const cell = row.cells[position + 1];
        cell.dataset.value = value === null ? "" : String(value);
        cell.textContent = value === null ? "\u2013" : value.toFixed(metric.digits);
        cell.className = metric.share && value !== null ? "share" : "";
        cell.style.setProperty("--v", value === null ? "0" : String(value));
      });
    }
    table.caption.textContent = metric.label;
    for (const head of table.tHead.rows[0].cells) {
      const before = head.getAttribute("aria-sort");
      if (before === "none" || before === null) continue;
      // Of shares the least is the worst, of distances the most: what was worst first stays so.
      const flips = head.cellIndex > 0 && metric.share !== shown.share;
      sort(head, flips ? (before === "ascending" ? "descending" : "ascending") : before);
    }
    shown = metric;
    status.textContent = "Showing " + metric.label;
  });
})();
