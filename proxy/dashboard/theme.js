// Light, dark or the system's own, before the first thing is painted. A classic script, so that it
// runs before the body; what was chosen is kept by this browser.
"use strict";

(() => {
  const chosen = (() => {
    try {
      return localStorage.getItem("doherty-theme");
    } catch {
      return null; // storage is closed to this page: the system's own it is
    }
  })();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
