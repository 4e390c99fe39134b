"""Style and script of the HTML report: text that goes into the page as it is, so that it needs nothing beside it."""

STYLE = """
:root { --ink: #1b1e23; --faint: #5a626e; --line: #d4d9e0; --tint: #d5e6f5; --blue: #00598c; --orange: #b55000; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.4rem 0 .6rem; font-size: 1.25rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); }
a { color: var(--blue); } nav a { margin-right: 1rem; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--line); border-radius: 6px; }
table.text th, table.text td { text-align: left; white-space: normal; vertical-align: top; }
table.text th { width: 18rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 7px; font-size: .86rem; text-align: right; white-space: nowrap; }
tr > * { border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; z-index: 1; background: #f1f4f8; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tbody th { font-weight: 600; } tfoot { font-weight: 600; }
tbody tr:hover { background: #f7f9fb; }
thead button { all: unset; cursor: pointer; font-weight: 600; padding: 2px 4px; border-radius: 4px; }
thead button::after { content: "\\2195"; margin-left: 4px; color: #8a93a0; }
th[aria-sort=ascending] button::after { content: "\\25B2"; color: var(--ink); }
th[aria-sort=descending] button::after { content: "\\25BC"; color: var(--ink); }
:focus-visible, thead button:focus-visible { outline: 3px solid var(--blue); outline-offset: 1px; }
td.share { background: linear-gradient(90deg, var(--tint) calc(var(--v) * 100%), transparent 0); }
select { font: inherit; padding: 3px 6px; } .tools { margin: .5rem 0; }
.chart { display: block; width: 100%; max-width: 820px; height: auto; margin-bottom: 1rem; }
.chart text { font-size: 12px; fill: var(--ink); } .chart .name { text-anchor: end; }
.chart .tick { text-anchor: middle; fill: var(--faint); } .chart .unit { text-anchor: end; fill: var(--faint); }
.chart .note { fill: var(--faint); } .chart .grid { stroke: #e4e8ed; }
.chart .box { fill: var(--tint); stroke: var(--blue); } .chart .median { stroke: var(--orange); stroke-width: 3; }
.chart .point { fill: var(--ink); fill-opacity: .55; }
article { border-top: 1px solid var(--line); padding-bottom: .8rem; }
.planes { display: flex; flex-wrap: wrap; gap: 12px; margin: .6rem 0; }
figure { margin: 0; } figure img { display: block; max-width: 100%; height: auto; background: #000; }
.key { display: inline-block; width: 34px; height: 0; margin: 0 6px 4px 0; vertical-align: middle;
  border-top: 4px solid rgb(86,180,233); }
.key.prediction { border-top: 4px dashed rgb(230,159,0); margin-left: 1.2rem; }
.key.differs { height: 14px; border: 1px solid #888; background: #c9c9c9; margin-left: 1.2rem; }
.skip { position: absolute; left: -999px; } .skip:focus { position: static; }
.status { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media print {
  .scroll { max-height: none; overflow: visible; } article { break-inside: avoid; } .tools { display: none; }
}
"""

SCRIPT = """
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
  const data = JSON.parse(document.getElementById("data").textContent);
  let shown = data[select.value];
  select.addEventListener("change", () => {
    const metric = data[select.value];
    for (const row of table.tBodies[0].rows) {
      metric.values[Number(row.dataset.row)].forEach((value, position) => {
        const cell = row.cells[position + 1];
        cell.dataset.value = value === null ? "" : String(value);
        cell.textContent = value === null ? "\\u2013" : value.toFixed(metric.digits);
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
"""
