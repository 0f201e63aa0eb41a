"use strict";
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".output.text_html, div.highlight pre, .formula, .pst-scrollable-table-container")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
});
