"use strict";
// Draws the figures in the colours of the page, again when it changes between light and dark, and of a live page the
// parts that have changed, where the reader is left at his place.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 34rem)");
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };
  let figures = JSON.parse(document.getElementById("traces-and-layouts").textContent);

  const variable = name => getComputedStyle(root).getPropertyValue(name).trim();

  function color(name) { // "--bits 0.25" lies between few and many bits
    const share = name.split(" ")[1];
    if (share === undefined) return variable(name);
    const [from, to, at] = share < 0.5 ? ["--few", "--some", 2 * share] : ["--some", "--many", 2 * share - 1];
    const [a, b] = [from, to].map(one => [1, 3, 5].map(n => parseInt(variable(one).slice(n, n + 2), 16)));
    return `rgb(${a.map((one, n) => Math.round(one + at * (b[n] - one))).join(",")})`;
  }

  function themed(value) { // a copy in which "--blue" is the style sheet's blue
    if (typeof value === "string") return value.startsWith("--") ? color(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, themed(one)]));
    }
    return value;
  }

  function merged(base, over) {
    const found = { ...base };
    for (const [key, value] of Object.entries(over || {})) {
      const both = value && typeof value === "object" && !Array.isArray(value) && found[key];
      found[key] = both ? merged(found[key], value) : value;
    }
    return found;
  }

  function layoutOf(layout) {
    const axis = {
      gridcolor: "--line", linecolor: "--line", zeroline: false, automargin: true, ticks: "", fixedrange: narrow.matches,
      title: { standoff: 8, font: { color: "--soft", size: 13 } }, tickfont: { color: "--soft" },
    };
    const base = {
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: narrow.matches ? 12 : 13, color: "--text" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 8, b: 8 },
      hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--text" } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      dragmode: narrow.matches ? false : "zoom", hovermode: "closest", separators: ".,", showlegend: false,
    };
    for (const key of ["xaxis", "yaxis", ...Object.keys(layout).filter(key => /^[xy]axis\d/.test(key))]) {
      base[key] = axis;
    }
    return merged(base, layout);
  }

  function draw(name) {
    const place = document.querySelector(`[data-figure="${name}"]`);
    if (!place) return undefined;
    const { data, layout } = figures[name];
    const room = place.clientWidth - 200; // of a map, beside its axis and scale
    const shown = data.map(one => (one.texttemplate && room / one.x.length < 44 ? { ...one, texttemplate: "" } : one));
    return Plotly.react(place, themed(shown), themed(layoutOf(layout)), CONFIG);
  }

  const drawAll = () => Promise.all(Object.keys(figures).map(draw));

  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("bitgenome-theme", root.dataset.theme); } catch { /* a page of a file may keep nothing */ }
    name();
    drawAll();
  });
  dark.addEventListener("change", () => { name(); drawAll(); });
  narrow.addEventListener("change", drawAll);
  name();
  drawAll().then(() => { root.dataset.drawn = "yes"; });

  // A live page
  const parts = of => new Map([...of.querySelectorAll("[data-part]")].map(one => [one.dataset.part, one]));
  const names = of => [...parts(of).keys(), ...[...of.querySelectorAll("[data-figure]")].map(one => one.dataset.figure)].join();
  const last = new Map([...parts(document)].map(([key, one]) => [key, one.innerHTML]));

  function renew(found) {
    const main = document.getElementById("main");
    const next = document.createElement("main");
    next.innerHTML = found.main;
    document.title = found.title;
    const before = figures;
    figures = found.figures;
    if (names(next) !== names(main)) return replace(main, next);
    for (const [key, one] of parts(next)) {
      const place = parts(main).get(key);
      if (last.get(key) !== one.innerHTML) {
        last.set(key, one.innerHTML);
        place.replaceChildren(...one.childNodes);
      }
    }
    const changed = Object.keys(figures).filter(key => JSON.stringify(figures[key]) !== JSON.stringify(before[key]));
    return Promise.all(changed.map(draw));
  }

  async function replace(main, next) { // sections came or went: the one that is read stays where it is on the screen
    const open = new Set([...main.querySelectorAll("details[open]")].map(one => one.closest("section").id));
    const focused = document.activeElement && document.activeElement.closest("section");
    const seen = one => one && one.getBoundingClientRect().bottom > 60 && one.getBoundingClientRect().top < innerHeight;
    const read = seen(focused) ? focused : [...main.querySelectorAll("section")].find(seen);
    const top = read && read.getBoundingClientRect().top;
    for (const [key, one] of parts(next)) last.set(key, one.innerHTML);
    main.replaceChildren(...next.childNodes);
    for (const one of main.querySelectorAll("details")) one.open = open.has(one.closest("section").id);
    const place = read && scrollY > 0 && document.getElementById(read.id);
    const back = () => place && scrollBy({ top: place.getBoundingClientRect().top - top, behavior: "instant" });
    back();
    await drawAll();
    back();
    if (focused) document.querySelector(`#${focused.id} summary`)?.focus({ preventScroll: true });
  }

  async function poll() {
    try {
      const answer = await fetch(root.dataset.live, { cache: "no-store" });
      if (answer.status === 200) {
        await renew(await answer.json());
        root.dataset.renewed = Number(root.dataset.renewed || 0) + 1;
      }
      document.getElementById("lost").hidden = true;
    } catch {
      document.getElementById("lost").hidden = false;
    }
    setTimeout(poll, 2000);
  }
  if (root.dataset.live) setTimeout(poll, 2000);
})();
