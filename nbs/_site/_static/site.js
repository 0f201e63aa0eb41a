"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const boxes = document.querySelectorAll(".output.text_html, div.highlight pre, .formula, .pst-scrollable-table-container");
  const look = box => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 2);
  const size = box => { if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; else box.removeAttribute("tabindex"); look(box); };
  const watch = new ResizeObserver(seen => seen.forEach(x => size(x.target)));
  for (const box of boxes) { size(box); watch.observe(box); box.addEventListener("scroll", () => look(box), { passive: true }); }
  for (const code of document.querySelectorAll("article p code, article li code")) if (code.textContent.length > 40) code.classList.add("long");
  for (const word of document.querySelectorAll("article code span.pre")) if (word.textContent.length < 24) word.classList.add("whole");
  for (const link of document.querySelectorAll(".page-toc a")) link.innerHTML = link.innerHTML.replace(/[._](?=\w)(?![^<]*>)/g, "$&<wbr>");
  for (const table of document.querySelectorAll("article table.dataframe")) {
    const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows], width = Math.max(...rows.map(row => row.cells.length));
    for (let k = 1; k <= width; k++) {
      const cells = rows.map(row => row.cells[row.cells.length - k]).filter(cell => cell && cell.tagName === "TD");
      if (cells.length && cells.every(cell => /^[-−–+\d.,%]*( \[[^\]]*\])?$/.test(cell.textContent.trim()))) for (const cell of [...cells, ...heads.map(row => row.cells[row.cells.length - k])]) if (cell && cell.colSpan < 2) cell.classList.add("number");
    }
  }
});
