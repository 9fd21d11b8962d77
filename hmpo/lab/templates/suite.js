"use strict";
(function () {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const chart = document.getElementById("chart");
  const quantity = document.getElementById("quantity");
  const block = document.getElementById("block");
  const seeds = document.getElementById("seeds");
  const bands = document.getElementById("bands");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function css(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function faint(colour, share) {
    const part = (at) => parseInt(colour.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${share})`;
  }

  function traces() {
    const areas = [];
    const lines = [];
    const means = [];
    for (const curve of (data.curves[quantity.value] || {})[block.value] || []) {
      const look = data.looks[curve.label];
      const colour = dark.matches ? look[1] : look[0];
      const steps = data.grids[curve.grid];
      const group = { legendgroup: curve.cell, showlegend: false, mode: "lines" };
      const known = steps.map((_, i) => i).filter((i) => curve.low[i] !== null);
      if (bands.checked && known.length) {
        const back = known.slice().reverse();
        areas.push(Object.assign({}, group, {
          x: known.map((i) => steps[i]).concat(back.map((i) => steps[i])),
          y: known.map((i) => curve.high[i]).concat(back.map((i) => curve.low[i])),
          line: { width: 0 }, fill: "toself", fillcolor: faint(colour, 0.16), hoverinfo: "skip",
        }));
      }
      for (const [seed, grid, values] of (seeds.checked && curve.seeds) || []) {
        lines.push(Object.assign({}, group, {
          x: data.grids[grid], y: values, line: { width: 0.8, color: faint(colour, 0.3) },
          hovertemplate: `${curve.label}, seed ${seed}, update %{x}: %{y:.3f}<extra></extra>`,
        }));
      }
      const ends = curve.mean.map((_, i) =>
        curve.low[i] === null ? "one seed, no interval" :
          `${curve.low[i].toPrecision(3)} to ${curve.high[i].toPrecision(3)}`);
      means.push({
        x: steps, y: curve.mean, customdata: ends, name: curve.label, legendgroup: curve.cell,
        mode: steps.length > 12 ? "lines" : "lines+markers",
        line: { color: colour, width: 2, dash: look[2] }, marker: { size: 5 },
        hovertemplate:
          `${curve.label}, update %{x}: %{y:.3g} [%{customdata}]<extra></extra>`,
      });
    }
    return areas.concat(lines, means);
  }

  function layout() {
    const narrow = chart.clientWidth < 600;
    const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--soft"),
      tickcolor: css("--soft"), automargin: true };
    const about = data.quantities.find((entry) => entry.name === quantity.value);
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: "system-ui, sans-serif", size: narrow ? 11 : 13 },
      height: 480, uirevision: quantity.value + "/" + block.value, margin: { l: 50, r: 10, t: 34, b: 40 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      hovermode: "closest", hoverlabel: { namelength: 30 },
      xaxis: Object.assign({ title: { text: "optimizer updates" } }, axis),
      yaxis: Object.assign({ title: { text: about.unit } }, axis),
      legend: narrow ? { orientation: "h", y: -0.22, yanchor: "top", groupclick: "togglegroup" } :
        { groupclick: "togglegroup" },
    };
  }

  function draw() {
    const many = (data.curves[quantity.value] || {})[block.value] || [];
    seeds.disabled = !many.some((curve) => curve.seeds);
    Plotly.react(chart, traces(), layout(), {
      displaylogo: false, responsive: true,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    });
  }

  function fill(select, values) {
    for (const [value, text] of values) {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = text;
      select.append(option);
    }
    select.disabled = values.length < 2;
    select.addEventListener("change", draw);
  }

  if (chart && data.quantities.length) {
    fill(quantity, data.quantities.map((entry) => [entry.name, entry.title]));
    fill(block, data.blocks.map((name) => [name, name || "all"]));
    seeds.addEventListener("change", draw);
    bands.addEventListener("change", draw);
    dark.addEventListener("change", draw);
    draw();
  }

  function sortKey(cell) {
    const text = cell.dataset.sort;
    if (text === undefined || text === "") return null;
    const number = Number(text);
    return Number.isNaN(number) ? text : number;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = Array.from(table.tBodies[0].rows, (row) => [sortKey(row.cells[column]), row]);
        const known = rows.filter(([key]) => key !== null);
        known.sort(([a], [b]) => (down ? -1 : 1) * compare(a, b));
        const rest = rows.filter(([key]) => key === null);
        table.tBodies[0].append(...known.concat(rest).map(([, row]) => row));
      });
    });
  }
})();
