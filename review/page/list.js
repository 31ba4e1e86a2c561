// A list of equally high rows, of which only those in sight are in the page: thousands stay smooth.

const HEIGHT = 84; // pixels, as in style.css
const BEYOND = 4; // rows kept above and below what is in sight

export class List {
  // fillRow(row, item): shows an item in an element that may have shown it before. choose(index): called on a click.
  constructor(box, rows, fillRow, choose) {
    Object.assign(this, { box, rows, fillRow, items: [], chosen: -1, kept: new Map() });
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
    rows.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) choose(Number(row.dataset.index));
    });
  }

  show(items, chosen) {
    const moved = this.items[this.chosen]?.name !== items[chosen]?.name;
    Object.assign(this, { items, chosen });
    this.rows.style.height = `${items.length * HEIGHT}px`;
    if (moved) this.reveal();
    this.draw();
  }

  reveal() {
    const { clientHeight, scrollTop } = this.box;
    const top = this.chosen * HEIGHT;
    if (top < scrollTop) this.box.scrollTop = top;
    if (top + HEIGHT > scrollTop + clientHeight) this.box.scrollTop = top + HEIGHT - clientHeight;
  }

  draw() {
    const first = Math.max(Math.floor(this.box.scrollTop / HEIGHT) - BEYOND, 0);
    const end = Math.ceil((this.box.scrollTop + this.box.clientHeight) / HEIGHT) + BEYOND;
    const kept = new Map();
    this.items.slice(first, end).forEach((item, offset) => {
      const row = this.kept.get(item.name) ?? document.createElement("div");
      const index = first + offset;
      row.dataset.index = index;
      row.id = `row${index}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", index === this.chosen);
      row.style.top = `${index * HEIGHT}px`;
      this.fillRow(row, item);
      kept.set(item.name, row);
    });
    this.kept = kept;
    this.rows.replaceChildren(...kept.values());
    this.box.setAttribute("aria-activedescendant", `row${this.chosen}`);
  }
}
