// Light and dark: the system's choice until the reader makes one; kept where the browser allows it.
"use strict";
const Theme = (() => {
  const media = window.matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  const stored = () => { try { return localStorage.getItem("xmoe-theme"); } catch { return null; } };
  const isDark = () => (document.documentElement.dataset.theme || (media.matches ? "dark" : "light")) === "dark";
  const tell = () => {
    const button = document.getElementById("theme");
    if (button) button.textContent = isDark() ? "Light page" : "Dark page";
    listeners.forEach((listener) => listener());
  };
  if (stored()) document.documentElement.dataset.theme = stored();
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("xmoe-theme", document.documentElement.dataset.theme); } catch { /* a file without storage */ }
      tell();
    });
    tell();
  });
  media.addEventListener("change", tell);
  return { isDark, onChange: (listener) => listeners.push(listener) };
})();
