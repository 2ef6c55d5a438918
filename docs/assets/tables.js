// Filters for what is long, and tables that can be read on a phone. Without scripts everything is there as it stands.
document.addEventListener("DOMContentLoaded", () => {
  const page = document.querySelector(".md-content__inner");
  if (!page) return;

  // Shows the items that have all the words, and what stands around them only where one is left.
  function filter(input, groups) {
    input.hidden = false;
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const { name, items, around } of groups) {
        let any = false;
        for (const item of items) {
          const text = `${name} ${item.textContent} ${item.dataset.words || ""}`.toLowerCase();
          item.hidden = !words.every((word) => text.includes(word));
          any ||= !item.hidden;
        }
        for (const part of around) part.hidden = !any;
      }
    });
  }

  const ITEMS = ".card, tbody tr";
  const own = page.querySelector(".jumps input");
  if (own) {
    // by heading: cards or rows, and all that stands between it and the next one
    const groups = [...page.querySelectorAll("h2")].map((heading) => {
      const around = [heading];
      for (let next = heading.nextElementSibling; next && !next.matches("h2, .md-source-file"); next = next.nextElementSibling)
        around.push(next);
      const items = around.flatMap((part) => [...part.querySelectorAll(ITEMS)]);
      return { name: heading.textContent, items: items.length ? items : around.slice(1), around };
    });
    filter(own, groups);
  } else {
    for (const table of page.querySelectorAll("table:not([class])")) {
      const items = [...table.tBodies[0].rows];
      if (items.length < 15) continue;
      const box = document.createElement("div");
      box.className = "jumps";
      box.innerHTML = '<input type="search" placeholder="Filter the rows" aria-label="Filter the rows">';
      (table.closest(".md-typeset__scrollwrap") || table).before(box);
      filter(box.firstChild, [{ name: "", items, around: [] }]);
    }
  }

  // On a narrow screen a row is a block, its cells under one another and named by their columns (site.css).
  for (const table of page.querySelectorAll("table:not([class])")) {
    const columns = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    table.parentElement.classList.add("stacked");
    for (const row of table.tBodies[0].rows)
      [...row.cells].forEach((cell, i) => {
        if (i === 0 || columns.length === 2 || !cell.textContent.trim()) return;
        const inside = document.createElement("span");
        inside.append(...cell.childNodes);
        cell.append(inside);
        cell.dataset.column = columns[i];
      });
  }
});
