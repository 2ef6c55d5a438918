// The gallery's filter: shows the cards that have all the words. Without scripts all cards are there.
document.addEventListener("DOMContentLoaded", () => {
  const search = document.querySelector(".jumps input");
  if (!search) return;
  search.hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const grid of document.querySelectorAll(".gallery")) {
      let any = false;
      for (const card of grid.children) {
        const text = card.textContent.toLowerCase();
        card.hidden = !words.every((word) => text.includes(word));
        any = any || !card.hidden;
      }
      grid.hidden = !any;
      // the heading and the sentence above it
      for (let above = grid.previousElementSibling, i = 0; above && i < 2; above = above.previousElementSibling, i++)
        above.hidden = !any;
    }
  });
});
