// Draws the figures of the page with plotly, in the page's colours; zooms and reads them by keyboard.
(() => {
  "use strict";
  const root = document.documentElement;
  let figures = JSON.parse(document.getElementById("figures").textContent);
  const ownTime = (figure) => Boolean(figure && figure.layout.meta && figure.layout.meta.own_time);
  const timelines = [...document.querySelectorAll('[data-plot="timeline"]')];
  const memories = [...document.querySelectorAll('[data-plot="memory"]')];
  const touch = matchMedia("(pointer: coarse)").matches;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let range = null; // of all time axes; null: all of them

  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const chosen = (node) => {
    const select = document.querySelector(`select[data-pane="${node.dataset.pane}"]`);
    return figures.steps[Number(select.value)];
  };
  // The time that holds all steps shown: phases around a step may begin before 0.
  const whole = () => {
    const all = timelines.map((node) => chosen(node).timeline.layout.xaxis.range);
    return [Math.min(...all.map((one) => one[0])), Math.max(...all.map((one) => one[1]))];
  };

  function layoutOf(figure, onTime) {
    const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule") };
    const own = figure.layout;
    const layout = {
      ...own,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily },
      margin: { l: 72, r: 8, t: 34, b: 34 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { align: "left" },
      dragmode: touch ? false : "zoom",
      xaxis: { ...own.xaxis, ...axis },
      yaxis: { ...own.yaxis, ...axis },
    };
    if (onTime) layout.xaxis.range = range || whole();
    return layout;
  }

  function draw(node, figure, onTime) {
    node.hidden = !figure;
    if (!figure) return;
    const config = { responsive: true, displayModeBar: false };
    Plotly.react(node, figure.data, layoutOf(figure, onTime), config).then(() => {
      if (!onTime || node.dataset.ready) return;
      node.dataset.ready = "yes";
      node.on("plotly_relayout", (change) => {
        if (ownTime(node)) return;
        if (change["xaxis.autorange"]) show(null);
        else if ("xaxis.range[0]" in change)
          show([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      });
    });
  }

  function drawAll() {
    for (const node of timelines) draw(node, chosen(node).timeline, true);
    for (const node of memories) draw(node, chosen(node).memory, !ownTime(chosen(node).memory));
    for (const node of document.querySelectorAll('[data-plot="losses"]')) draw(node, figures.losses, false);
    document.getElementById("theme").textContent = isDark() ? "Light mode" : "Dark mode";
  }

  // All time axes show the same range.
  function show(wanted) {
    const [begin, end] = whole();
    if (wanted) {
      const width = Math.min(end - begin, Math.max(wanted[1] - wanted[0], (end - begin) / 5000));
      const start = Math.min(Math.max(begin, wanted[0]), end - width);
      wanted = [start, start + width];
    }
    range = wanted && wanted[1] - wanted[0] < end - begin ? wanted : null;
    const now = range || [begin, end];
    for (const node of [...timelines, ...memories]) {
      if (node.hidden || ownTime(node)) continue;
      const shown = node.layout.xaxis.range;
      if (shown[0] !== now[0] || shown[1] !== now[1]) Plotly.relayout(node, { "xaxis.range": now });
    }
  }

  const zooms = {
    in: ([a, b]) => [a + (b - a) / 4, b - (b - a) / 4],
    out: ([a, b]) => [a - (b - a) / 2, b + (b - a) / 2],
    left: ([a, b]) => [a - (b - a) / 3, b - (b - a) / 3],
    right: ([a, b]) => [a + (b - a) / 3, b + (b - a) / 3],
    all: () => null,
  };
  const zoom = (how) => show(zooms[how](range || whole()));

  // The instruction that the arrow keys have reached, on each timeline.
  const at = new WeakMap();

  function barsOf(node) {
    const rows = new Map();
    node.data.forEach((trace, curveNumber) => {
      trace.y.forEach((device, pointNumber) => {
        if (!rows.has(device)) rows.set(device, []);
        const start = trace.base[pointNumber];
        rows.get(device).push({
          curveNumber, pointNumber, start, end: start + trace.x[pointNumber],
          words: `${device}: ${trace.customdata[pointNumber].filter(Boolean).join("; ")}`,
        });
      });
    });
    const devices = node.layout.yaxis.categoryarray.filter((device) => rows.has(device));
    return devices.map((device) => rows.get(device).sort((a, b) => a.start - b.start));
  }

  function step(node, across, down) {
    const rows = barsOf(node);
    const place = at.get(node) || { row: 0, index: -1 };
    const old = rows[Math.min(place.row, rows.length - 1)][Math.max(0, place.index)];
    const row = Math.min(rows.length - 1, Math.max(0, place.row + down));
    let index = place.index + across;
    if (down) index = Math.max(0, rows[row].findLastIndex((bar) => bar.start <= old.start));
    index = Math.min(rows[row].length - 1, Math.max(0, index));
    at.set(node, { row, index });
    const bar = rows[row][index];
    const [from, to] = node.layout.xaxis.range;
    if (bar.end > to || bar.start < from) show([bar.start, bar.start + to - from]);
    Plotly.Fx.hover(node, [{ curveNumber: bar.curveNumber, pointNumber: bar.pointNumber }]);
    document.getElementById("said").textContent = bar.words.replace(/<\/?b>/g, "");
  }

  const keys = {
    ArrowLeft: (node) => step(node, -1, 0),
    ArrowRight: (node) => step(node, 1, 0),
    ArrowUp: (node) => step(node, 0, -1),
    ArrowDown: (node) => step(node, 0, 1),
    "+": () => zoom("in"),
    "=": () => zoom("in"),
    "-": () => zoom("out"),
    0: () => zoom("all"),
  };
  for (const node of timelines)
    node.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keys[event.key](node);
    });
  for (const button of document.querySelectorAll("[data-zoom]"))
    button.addEventListener("click", () => zoom(button.dataset.zoom));
  for (const select of document.querySelectorAll("select[data-pane]"))
    select.addEventListener("change", () => { range = null; drawAll(); });
  document.querySelectorAll("[hidden]").forEach((node) => { node.hidden = false; });

  const remembered = (() => { try { return localStorage.getItem("stagewise-theme"); } catch { return null; } })();
  if (remembered) root.dataset.theme = remembered;
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("stagewise-theme", root.dataset.theme); } catch { /* not allowed */ }
    drawAll();
  });
  system.addEventListener("change", drawAll);
  document.getElementById("save").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("numbers").textContent], { type: "application/json" }));
    link.download = "numbers.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  drawAll();

  // A live page asks its server for what is new, until the run has ended.
  const shape = () => [Math.min(2, figures.steps.length), !figures.losses].join();

  function update(news) {
    const before = shape();
    figures = news.figures;
    document.getElementById("numbers").textContent = JSON.stringify(news.numbers);
    if (shape() !== before) { location.reload(); return; } // other pictures than before
    for (const [name, html] of Object.entries(news.parts)) {
      const part = document.querySelector(`[data-part="${name}"]`);
      const open = [...part.querySelectorAll("details")].map((node) => node.open);
      part.innerHTML = html;
      part.querySelectorAll("details").forEach((node, index) => { node.open = Boolean(open[index]); });
    }
    for (const select of document.querySelectorAll("select[data-pane]")) {
      const old = [...select.options].map((option) => option.text);
      const names = figures.steps.map((step) => step.name);
      if (names.join("\n") === old.join("\n")) continue;
      const kept = names.indexOf(old[select.selectedIndex]);
      select.replaceChildren(...names.map((name, index) => new Option(name, index)));
      select.selectedIndex = kept < 0 ? Number(select.dataset.pane) : kept;
    }
    drawAll();
  }

  async function follow(version) {
    const said = document.getElementById("live");
    const began = performance.now();
    try {
      const answer = await fetch(`news?seen=${encodeURIComponent(version)}`);
      if (!answer.ok) throw new Error(answer.statusText);
      if (answer.status === 200) {
        const news = await answer.json();
        version = news.version;
        update(news);
      }
    } catch {
      said.textContent = "The run has ended; this page shows its last state.";
      return;
    }
    const took = performance.now() - began; // on a core that training could have used
    setTimeout(follow, Math.max(2000, 20 * took), version);
  }
  if (document.body.dataset.version) follow(document.body.dataset.version);
})();
