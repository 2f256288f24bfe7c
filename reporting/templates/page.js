"use strict";
const root = document.documentElement;
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const read = (id) => JSON.parse(document.getElementById(id).textContent);

// Light or dark: as the system says until the button is used.
const themeButton = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let onTheme = () => {};
function setTheme(name) {
  root.dataset.theme = name;
  themeButton.setAttribute("aria-pressed", String(name === "dark"));
  onTheme();
}
setTheme(systemDark.matches ? "dark" : "light");
systemDark.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
themeButton.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

// Every picture is in the page once, however often it is shown.
const thumbs = read("thumbs");
for (const image of all("img[data-thumb]")) image.src = thumbs[image.dataset.thumb];
