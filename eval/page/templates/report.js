// Draws the figures that the page carries as JSON, in the colours of the theme.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures");
  // Blue for less, orange for more (told apart with any colour vision), the page's background in the middle.
  const scale = () => Theme.isDark() && !printing
    ? [[0, "#56b4e9"], [0.5, "#11151a"], [1, "#ff9d4d"]] : [[0, "#0072b2"], [0.5, "#ffffff"], [1, "#d55e00"]];
  let printing = false;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const lighter = { "#0072B2": "#5aa9e6", "#8C6D1F": "#c9a94e", "#009E73": "#2fc79b" };
  const themed = (trace) => {
    const made = structuredClone(trace);
    if (made.colorscale === "load") made.colorscale = scale();
    if (Theme.isDark() && !printing) {
      for (const part of [made.line, made.marker]) if (part && lighter[part.color]) part.color = lighter[part.color];
    }
    return made;
  };
  const layoutOf = (figure) => {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
    const own = structuredClone(figure.layout);
    delete own.meta;
    return {
      ...own, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis, autorange: figure.traces[0].type === "heatmap" ? "reversed" : true },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--fg"), size: 12 },
      margin: { l: 60, r: 15, t: 15, b: 50 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, hovermode: "closest",
    };
  };
  const chosen = {};
  const draw = () => {
    for (const figure of figures) {
      const root = document.getElementById(`plot-${figure.id}`);
      const meta = figure.layout.meta;
      const traces = meta ? [meta.traces[chosen[figure.id] || 0]] : figure.traces;
      Plotly.react(root, traces.map(themed), layoutOf(figure), { displaylogo: false, responsive: true, displayModeBar: false });
    }
  };
  for (const figure of figures) {
    const select = document.getElementById(`choose-${figure.id}`);
    select?.addEventListener("change", () => { chosen[figure.id] = Number(select.value); draw(); });
  }
  draw();
  Theme.onChange(draw);
  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
  const sets = read("sentences");
  const root = document.getElementById("explorer-root");
  const pick = document.getElementById("explorer-run");
  const mount = () => Explorer.mount(root, sets[pick ? Number(pick.value) : 0].sentences, { filter: true });
  if (root && sets.length) { pick?.addEventListener("change", mount); mount(); }
})();
