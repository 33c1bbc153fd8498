"""The report's style sheet for light and dark backgrounds, and the script that draws the figures."""

STYLE = """\
:root { --ground: #f8fafc; --card: #ffffff; --ink: #0f172a; --soft: #64748b; --edge: #e2e8f0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0b1120; --card: #131c2f; --ink: #e2e8f0; --soft: #94a3b8; --edge: #26324a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
h1 { margin: 0; font-size: 28px; font-weight: 650; letter-spacing: -0.02em; }
h1 span { color: var(--soft); font-weight: 400; }
h2 { margin: 0 0 4px; font-size: 17px; font-weight: 600; }
header p { margin: 4px 0 20px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tiles div, figure, details { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tiles div { padding: 12px 16px; }
.tiles strong {
  display: block; font-size: 20px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums;
}
.tiles span { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 16px 18px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 13.5px; max-width: 95ch; }
table { border-collapse: collapse; margin: 8px 0 12px; font-variant-numeric: tabular-nums; }
td { padding: 4px 28px 4px 0; border-bottom: 1px solid var(--edge); }
td + td { text-align: right; padding-right: 0; }
th { padding: 4px 0 4px 28px; text-align: right; font-weight: 500; color: var(--soft); }
th:first-child { padding-left: 0; text-align: left; }
td + td + td { padding-left: 28px; }
td.words { text-align: left; max-width: 90ch; }
tfoot { font-weight: 600; }
details { margin-top: 16px; padding: 12px 18px; }
details:last-child { margin-bottom: 40px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 13px; }
@media (max-width: 860px) { .figures { grid-template-columns: minmax(0, 1fr); } }
"""

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

function draw() {
  FIGURES.forEach(({ data, layout }, i) => {
    const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
    Plotly.react(`figure-${i}`, data, { ...layout, template: template() }, options);
  });
}

draw();
dark.addEventListener("change", draw);
"""
