// The chosen theme, set before the first paint. Without a choice, the system's.
(() => {
  try {
    const theme = localStorage.getItem("retnet.theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is blocked: the system's theme is used.
  }
})();
