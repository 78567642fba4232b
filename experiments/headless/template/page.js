// All code at once: the buttons appear only where this script runs; without it each cell still unfolds by itself.
const folds = [...document.querySelectorAll("details.code")];
const buttons = [...document.querySelectorAll("button.all-code")];
const label = () => {
  const open = folds.length > 0 && folds.every((fold) => fold.open);
  for (const button of buttons) {
    button.textContent = open ? "Hide all code" : "Show all code";
    button.setAttribute("aria-pressed", String(open));
  }
};
for (const button of buttons) {
  button.hidden = folds.length === 0;
  button.addEventListener("click", () => {
    const open = !folds.every((fold) => fold.open);
    // What is looked at stays where it is while the code above it comes or goes.
    const middle = [...document.querySelectorAll("main > section")].find((s) => s.getBoundingClientRect().bottom > 0);
    const before = middle ? middle.getBoundingClientRect().top : 0;
    for (const fold of folds) fold.open = open;
    if (middle && window.scrollY > 0) {
      window.scrollBy({ top: middle.getBoundingClientRect().top - before, behavior: "instant" });
    }
    label();
  });
}
for (const fold of folds) fold.addEventListener("toggle", label);
label();

// What is wider than its place scrolls: it shows on which side there is more, and only it is a stop of the Tab key.
const boxes = [...document.querySelectorAll("[tabindex='0']")];
const edges = (box) => {
  const hidden = box.scrollWidth - box.clientWidth;
  box.classList.toggle("more-left", hidden > 1 && box.scrollLeft > 1);
  box.classList.toggle("more-right", hidden > 1 && box.scrollLeft < hidden - 1);
  if (hidden > 1) box.setAttribute("tabindex", "0");
  else if (box !== document.activeElement) box.removeAttribute("tabindex");
};
const allEdges = () => boxes.forEach(edges);
for (const box of boxes) box.addEventListener("scroll", () => edges(box), { passive: true });
for (const fold of document.querySelectorAll("details")) fold.addEventListener("toggle", allEdges);
window.addEventListener("resize", allEdges);
window.addEventListener("load", allEdges);
allEdges();

// The list of contents of a narrow screen closes when a chapter was chosen.
for (const link of document.querySelectorAll("details.contents a")) {
  link.addEventListener("click", () => { link.closest("details").open = false; });
}

// Where the reader is, marked in the contents.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link, link.getAttribute("href").slice(1)]));
const mark = () => {
  const passed = [...document.querySelectorAll("main h2[id]")].filter((h) => h.getBoundingClientRect().top < 120);
  const here = passed.length ? passed[passed.length - 1].id : "";
  for (const [link, id] of links) {
    if (decodeURIComponent(id) === here) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
};
let waiting = false;
window.addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; mark(); });
}, { passive: true });
mark();
