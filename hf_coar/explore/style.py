"""The look of the explorer, and the little JavaScript that clicks need."""

CSS = """
.gradio-container { max-width: 1320px !important; width: 100% !important; margin: 0 auto !important; }
#message:not(:has(.coar-warning)) { display: none; }
.coar { --coar-pos: #0072b2; --coar-neg: #d55e00; --coar-ink: var(--body-text-color);
  --coar-faint: var(--body-text-color-subdued); --coar-line: var(--border-color-primary);
  --coar-soft: var(--background-fill-secondary); color: var(--coar-ink); font-size: .925rem; line-height: 1.45; }
.dark .coar { --coar-pos: #4aa8e0; --coar-neg: #f0893e; }
.coar h2 { font-size: 1.15rem; margin: 0 0 .35rem; } .coar h3 { font-size: .98rem; margin: 1.1rem 0 .4rem; }
.coar p { margin: .25rem 0; } .coar .coar-note { color: var(--coar-faint); font-size: .85rem; }
.coar .coar-warning { border-left: 3px solid var(--coar-neg); padding: .35rem .7rem; background: var(--coar-soft); }
.coar .coar-statement { font-size: 1rem; }
.coar button { font: inherit; color: inherit; cursor: pointer; }
.coar button:focus-visible, .coar input:focus-visible, .coar [tabindex]:focus-visible {
  outline: 2px solid var(--coar-pos); outline-offset: 2px; }
.coar .coar-link { background: none; border: 0; padding: 0; text-align: left; text-decoration: underline;
  text-decoration-color: var(--coar-line); text-underline-offset: 3px; }
.coar .coar-link:hover { text-decoration-color: currentColor; }
.coar .coar-small { border: 1px solid var(--coar-line); border-radius: 6px; background: var(--coar-soft);
  padding: .2rem .65rem; }
.coar .coar-small:hover { border-color: var(--coar-ink); }
.coar .coar-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px; }
.coar .coar-cards.coar-texts { grid-template-columns: 1fr; }
.coar .coar-card { border: 1px solid var(--coar-line); border-radius: 8px; background: var(--coar-soft); padding: 6px;
  display: flex; flex-direction: column; gap: 2px; text-align: left; font-size: .78rem; line-height: 1.25;
  overflow: hidden; min-width: 0; }
.coar button.coar-card:hover { border-color: var(--coar-ink); }
.coar .coar-card[aria-pressed=true], .coar .coar-card[aria-current=true] {
  border-color: var(--coar-pos); box-shadow: inset 0 0 0 1px var(--coar-pos); }
.coar .coar-card .coar-image { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8882;
  border-radius: 4px; }
.coar .coar-card .coar-snippet { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
  overflow: hidden; overflow-wrap: anywhere; font-size: .85rem; }
.coar .coar-card .coar-said { overflow-wrap: anywhere; }
.coar .coar-wrong { color: var(--coar-neg); font-weight: 600; }
.coar .coar-faint { color: var(--coar-faint); }
.coar .coar-mark { font-weight: 600; border-radius: 4px; padding: 0 .3rem; align-self: start; color: #fff; }
.coar .coar-mark-lower { background: #b34e00; } .coar .coar-mark-higher { background: #0072b2; }
.coar .coar-mark-spared { background: #666; }
.coar .coar-layers td:nth-child(2), .coar .coar-layers thead th:nth-child(2) { text-align: right; }
.coar .coar-layers .coar-track { width: min(300px, 20vw); }
.coar .coar-heads-row { display: grid; grid-template-columns: minmax(4rem, 9rem) 1fr; gap: .6rem; align-items: center;
  font-size: .8rem; margin: 2px 0; } .coar .coar-heads-row > span:first-child { text-align: right; }
.coar .coar-heads { display: flex; flex-wrap: wrap; gap: 2px; }
.coar .coar-head { border: 1px solid var(--coar-line); border-radius: 3px; min-width: 1.9rem; padding: .15rem .2rem;
  background: color-mix(in srgb, var(--coar-pos) var(--share), transparent); font-size: .75rem; }
.coar .coar-acts { grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.coar .coar-seen { position: relative; display: block; line-height: 0; }
.coar .coar-card .coar-seen .coar-image { width: 100%; aspect-ratio: auto; border-radius: 4px; }
.coar .coar-box { position: absolute; border: 2px solid #ffd400; outline: 1px solid #000; border-radius: 3px; }
.coar .coar-context { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
.coar mark.coar-here { background: #ffd400; color: #000; border-radius: 3px; padding: 0 .1em; }
.coar .coar-crisp { image-rendering: pixelated; }
.coar .coar-image { display: block; margin: 0; }
.coar .coar-top { display: grid; grid-template-columns: 150px 1fr; gap: 1.1rem; align-items: start; }
.coar .coar-top.coar-of-text { grid-template-columns: 1fr; }
.coar .coar-top > .coar-image, .coar .coar-top .coar-big .coar-image { width: 150px; border-radius: 6px; }
.coar .coar-text { max-height: 11rem; overflow: auto; border: 1px solid var(--coar-line); border-radius: 6px;
  padding: .5rem .7rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--coar-soft); }
.coar .coar-token { background: none; border: 0; border-bottom: 2px solid transparent; padding: 0;
  white-space: pre-wrap; text-align: left; }
.coar .coar-token:hover { background: #8883; }
.coar .coar-token[aria-pressed=true] { background: var(--coar-pos); color: var(--body-background-fill); }
.coar .coar-text .coar-hit { border-bottom: 2px solid var(--coar-pos); }
.coar table.coar-table { border-collapse: collapse; width: 100%; margin: .2rem 0; font-size: .86rem;
  font-variant-numeric: tabular-nums; border: 0; }
.coar .coar-table caption { text-align: left; color: var(--coar-faint); padding: .1rem 0 .25rem; }
.coar .coar-table th, .coar .coar-table td { border: 0; border-bottom: 1px solid var(--coar-line);
  padding: .2rem .45rem;
  text-align: left; font-weight: 400; background: none; vertical-align: middle; }
.coar .coar-table thead th { color: var(--coar-faint); font-size: .78rem; }
.coar .coar-table td:last-child, .coar .coar-table thead th:last-child { text-align: right; white-space: nowrap; }
.coar .coar-table input { margin: 0; width: 1rem; height: 1rem; accent-color: var(--coar-pos); appearance: auto;
  -webkit-appearance: auto; }
.coar .coar-narrow { max-width: 26rem; }
.coar .coar-numbers td, .coar .coar-numbers thead th + th { text-align: right; }
.coar .coar-pick { display: flex; gap: .45rem; align-items: center; }
.coar .coar-name { min-width: 0; overflow-wrap: anywhere; }
.coar ol { margin: 0; padding-left: 2rem; }
.coar .coar-pick input { flex: none; }
.coar table.coar-listed { table-layout: fixed; } .coar .coar-listed th:nth-child(1) { width: 52%; }
.coar .coar-listed th:nth-child(2) { width: 20%; } .coar .coar-listed .coar-track { width: 100%; }
.coar .coar-name[aria-current=true] { font-weight: 650; }
.coar table.coar-ranked { table-layout: fixed; } .coar .coar-ranked th:nth-child(1) { width: 53%; }
.coar table.coar-ranked td { font-size: .82rem; padding: .2rem .3rem; }
.coar .coar-ranked .coar-name { font-size: .8rem; }
.coar .coar-ranked th:nth-child(2) { width: 13%; } .coar .coar-ranked .coar-bar { width: 100%; }
.coar .coar-bar { width: 110px; height: 15px; display: block; }
.coar .coar-columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.6rem;
  align-items: start; }
.coar .coar-columns.coar-aside { grid-template-columns: minmax(0, 1fr) 250px; }
.coar .coar-pos { fill: var(--coar-pos); } .coar .coar-neg { fill: var(--coar-neg); } .coar .coar-zero { fill: #888; }
.coar span.coar-pos { background: var(--coar-pos); } .coar span.coar-neg { background: var(--coar-neg); }
.coar .coar-whisker { stroke: var(--coar-ink); fill: none; stroke-width: 1; }
.coar .coar-axis, .coar .coar-grid { stroke: var(--coar-faint); fill: none; stroke-width: .7; }
.coar .coar-grid { stroke-dasharray: 2 3; } .coar .coar-same { stroke: var(--coar-faint); stroke-width: 1; }
.coar .coar-dot { fill: var(--coar-pos); fill-opacity: .55; } .coar .coar-marked { fill: var(--coar-neg);
  fill-opacity: 1; stroke: var(--coar-ink); }
.coar svg text { fill: var(--coar-faint); font-size: 10px; }
.coar .coar-scatter { width: 250px; } .coar .coar-histogram { width: 100%; max-width: 420px; }
.coar .coar-track { display: inline-block; width: 90px; height: 9px; background: #8883; border-radius: 2px;
  vertical-align: middle; overflow: hidden; }
.coar .coar-pair .coar-track { display: block; height: 6px; margin: 2px 0; width: 100px; }
.coar .coar-percent { display: inline-block; min-width: 4.2em; } .coar .coar-whole { white-space: nowrap; }
.coar .coar-track > span { display: block; height: 100%; background: var(--coar-pos); }
.coar .coar-track > .coar-before { background: #888; }
.coar .coar-heat { max-height: 27rem; overflow: auto; padding: 2px; }
.coar .coar-heat-row { display: grid; grid-template-columns: minmax(5rem, 11rem) minmax(0, 1fr) 8.5rem; gap: .7rem;
  align-items: center; min-height: 18px; }
.coar .coar-heat-head { color: var(--coar-faint); font-size: .78rem; } .coar .coar-heat-head span:last-child {
  text-align: right; }
.coar .coar-heat-name { font-size: .8rem; text-align: right; overflow-wrap: anywhere; line-height: 1.15; }
.coar .coar-strip { display: block; height: 14px; outline: 1px solid var(--coar-line); cursor: pointer; }
.coar .coar-strip img { width: 100%; height: 100%; image-rendering: pixelated; display: block; margin: 0;
  max-width: none; }
.coar .coar-total { font-size: .8rem; text-align: right; font-variant-numeric: tabular-nums; display: flex;
  align-items: center; justify-content: flex-end; gap: .4rem; }
.coar .coar-total-bar { height: 8px; display: inline-block; }
.coar .coar-key { display: flex; gap: .5rem; align-items: center; font-size: .78rem; color: var(--coar-faint);
  margin-top: .4rem; flex-wrap: wrap; }
.coar .coar-ramp { width: 120px; height: 9px; background: linear-gradient(to right, var(--coar-neg), transparent,
  var(--coar-pos)); outline: 1px solid var(--coar-line); }
.coar .coar-hover { margin-left: auto; color: var(--coar-ink); }
.coar .coar-pager { display: flex; gap: .5rem; align-items: center; margin: .5rem 0; flex-wrap: wrap; }
.coar .coar-figures { display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; margin: .3rem 0 .4rem; }
.coar .coar-spark { display: inline-block; width: 70px; height: 22px; vertical-align: -4px; }
.coar .coar-spark polyline { fill: none; stroke: var(--coar-pos); stroke-width: 1.7; }
.coar .coar-figure b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; font-weight: 600; }
.coar .coar-figure span { color: var(--coar-faint); font-size: .8rem; }
.dark .coar .coar-strip img { filter: brightness(1.5); }
#mark-all { align-self: end; min-height: 2.75rem; }
@media (max-width: 760px) {
  .coar-first { order: -1; }
  .coar .coar-top .coar-track { width: 50px; }
  .coar .coar-columns, .coar .coar-columns.coar-aside { grid-template-columns: 1fr; }
  .coar .coar-top { grid-template-columns: 96px 1fr; } .coar .coar-top .coar-big .coar-image { width: 96px; }
  .coar .coar-heat-row { grid-template-columns: 5.5rem minmax(0, 1fr) 4.2rem; gap: .4rem; }
  .coar .coar-total-bar { display: none; } .coar .coar-bar { width: 70px; }
}
"""

# Clicks on anything with `data-act` reach Python as one event; the focus survives the redrawing that follows.
ON_LOAD = """
let wanted = null;
const key = node => `[data-act="${node.dataset.act}"][data-value="${CSS.escape(node.dataset.value)}"]`;
const cell = event => {
  const strip = event.target.closest('.coar-strip');
  if (!strip) return null;
  const box = strip.getBoundingClientRect(), values = JSON.parse(strip.dataset.values);
  const reached = Math.floor((event.clientX - box.left) / box.width * values.length);
  const at = Math.min(values.length - 1, Math.max(0, reached));
  return {component: JSON.parse(strip.dataset.components)[at], value: values[at], strip};
};
element.addEventListener('click', event => {
  const found = cell(event);
  if (found) { trigger('click', {act: 'component', value: String(found.component)}); return; }
  const target = event.target.closest('[data-act]');
  if (!target || target.disabled) return;
  wanted = key(target);
  trigger('click', {act: target.dataset.act, value: target.dataset.value});
});
element.addEventListener('mousemove', event => {
  const found = cell(event), heat = event.target.closest('.coar-heat');
  if (!heat) return;
  const out = heat.querySelector('.coar-hover');
  const place = found && found.component - Number(found.strip.dataset.first);
  out.textContent = found ? `${found.strip.dataset.name}, number ${place}: `
    + (found.value < 0 ? '−' : '+') + Math.abs(found.value).toPrecision(3) + ' ' + heat.dataset.unit : '';
});
watch('value', () => {
  const again = wanted && element.querySelector(wanted);
  const lost = !document.activeElement || document.activeElement === document.body;
  if (again && lost) again.focus({preventScroll: true});
});
"""

# The address bar and the field "Link to this view" follow what is looked at; the theme stays.
LINK = """
(query) => {
  const theme = new URLSearchParams(window.location.search).get('__theme');
  const address = window.location.origin + window.location.pathname + '?' + query;
  window.coarReady = 'yes';
  window.history.replaceState(null, '', address + (theme ? '&__theme=' + theme : ''));
  return address;
}
"""

SEARCH = "() => window.location.search"
READY = "(view, search) => [view, window.coarReady || '']"
