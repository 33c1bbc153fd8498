"""The script that draws the report's figures."""

SCRIPT = """\
const dark = matchMedia("(prefers-color-scheme: dark)");

function template() {
  const [ink, grid, edge] = dark.matches ? ["#cbd5e1", "#26324a", "#475569"] : ["#334155", "#e9eef5", "#cbd5e1"];
  const size = 12.5, clear = "rgba(0,0,0,0)";
  const title = { standoff: 8, font: { size } };
  const axis = { gridcolor: grid, linecolor: edge, zerolinecolor: edge, automargin: true, title };
  return {
    layout: {
      paper_bgcolor: clear,
      plot_bgcolor: clear,
      font: { color: ink, family: "system-ui, sans-serif", size },
      margin: { l: 56, r: 16, t: 28, b: 48 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, title: { font: { size } }, bgcolor: clear },
      hovermode: "closest",
      modebar: { bgcolor: clear, color: edge, activecolor: ink },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

// On a narrow screen, axes that are side by side go one below the other.
function stacked(layout) {
  const pairs = Object.keys(layout).filter((name) => /^xaxis\\d*$/.test(name)).map((x) => {
    const y = `yaxis${(layout[x].anchor ?? "y").slice(1)}`;
    return { x, y, left: layout[x].domain?.[0] ?? 0, top: layout[y]?.domain?.[1] ?? 1 };
  });
  if (!pairs.some((pair) => pair.left > 0.1)) return layout;
  pairs.sort((a, b) => b.top - a.top || a.left - b.left);
  const height = 300 * pairs.length + 60, gap = 110 / height, changed = { ...layout, height };
  const side = (1 - gap * (pairs.length - 1)) / pairs.length;
  pairs.forEach((pair, i) => {
    const top = 1 - i * (side + gap);
    changed[pair.x] = { ...layout[pair.x], domain: [0, 1], showticklabels: true };
    changed[pair.y] = { ...layout[pair.y], domain: [Math.max(0, top - side), top] };
    for (const name of Object.keys(layout).filter((key) => /^legend\\d*$/.test(key))) {
      const { x, y } = layout[name];
      if (y === pair.top && x === pair.left) changed[name] = { ...layout[name], x: 0, y: top };
    }
  });
  return changed;
}

const narrow = matchMedia("(max-width: 700px)");

function draw() {
  FIGURES.forEach(({ data, layout }, i) => {
    const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
    const fitted = narrow.matches ? stacked(layout) : layout;
    Plotly.react(`figure-${i}`, data, { ...fitted, template: template() }, options);
  });
}

draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
"""
