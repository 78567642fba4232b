// The explorers of the notebook where no kernel answers: the same controls over numbers that are in the page. The
// picture that the notebook has saved stays in its place where this script does not run.
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const tidy = (value) => String(+value.toPrecision(4)).replace("-", "−");

// A chart as wide as its place, so that its text has one size on every screen. x, y: the limits of the axes; draw: what
// stands on them, given how to place an x and a y.
const chart = (place, { title, x, y, height = 210, unit = "", xlabel = "", right = null, draw }) => {
  const width = Math.max(place.clientWidth, 240), left = 46, bottom = xlabel ? 40 : 24, edge = right ? 34 : 10;
  const X = (value) => +(left + ((value - x[0]) / (x[1] - x[0])) * (width - left - edge)).toFixed(2);
  const Y = (value) => +(height - bottom - ((value - y[0]) / (y[1] - y[0])) * (height - bottom - 8)).toFixed(2);
  const ticks = (limits, most) => {
    const low = Math.min(...limits), high = Math.max(...limits);
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
    return Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, i) => (Math.ceil(low / step) + i) * step);
  };
  const text = (at, up, anchor, value) => `<text x="${at}" y="${up}" text-anchor="${anchor}">${value}</text>`;
  const marks = [
    ...ticks(y, 4).map((at) => `<path class="grid" d="M${left} ${Y(at)}H${width - edge}"/>` + text(left - 5, Y(at) + 4, "end", tidy(at) + unit)),
    ...ticks(x, Math.min(6, width / 60)).map((at) => text(X(at), height - bottom + 16, "middle", tidy(at))),
    ...(right || []).map(([at, value]) => text(width - edge + 5, Y(at) + 4, "start", value)),
    xlabel && text((left + width - edge) / 2, height - 6, "middle", escaped(xlabel)),
  ];
  const border = `<path class="border" d="M${left} 8V${height - bottom}H${width - edge}"/>`;
  place.innerHTML = `<p class="title">${escaped(title)}</p><svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" aria-hidden="true">${marks.join("")}${draw(X, Y)}${border}</svg>`;
};
const line = (points, X, Y) => `M${points.map(([x, y]) => `${X(x)} ${Y(y)}`).join("L")}`;
const bar = (x0, x1, y, X, Y) => (y > 0 ? `M${X(x0)} ${Y(0)}V${Y(y)}H${X(x1)}V${Y(0)}Z` : "");
const rect = (kind, x0, x1, y0, y1, X, Y) =>
  `<rect class="${kind}" x="${X(x0)}" y="${Y(y1)}" width="${Math.max(X(x1) - X(x0), 0)}" height="${Y(y0) - Y(y1)}"/>`;

// Controls with their names, a sentence that says what is seen, and places for charts.
const panel = (box, controls, places, note) => {
  const field = ([name, control]) => `<label><span>${escaped(name)}</span>${control}</label>`;
  box.innerHTML = `<div class="controls">${controls.map(field).join("")}</div><p class="said" role="status"></p>
    <div class="charts">${places.map((kind) => `<div class="chart ${kind}"></div>`).join("")}</div><p class="key">${note}</p>`;
  return { inputs: [...box.querySelectorAll("select, input")], said: box.querySelector(".said"), charts: [...box.querySelectorAll(".chart")] };
};
const menu = (names, start) =>
  `<select>${names.map((name) => `<option${name === start ? " selected" : ""}>${escaped(name)}</option>`).join("")}</select>`;
const slider = (min, max, step, value) => `<input type="range" min="${min}" max="${max}" step="${step}" value="${value}"><output></output>`;
const key = (kind, text) => `<span><i class="swatch ${kind}"></i>${text}</span>`;
const chosen = []; // of every explorer, what shows the layer that another one shows

const quantizer = (box, { samples, start }) => {
  const controls = [["weights", menu(Object.keys(samples), start)], ["dead zone", slider(0.01, 0.95, 0.01, 0.25)], ["bits", slider(2, 8, 1, 4)]];
  const keys = key("zone", "dead zone d") + key("outside", "weights") + key("inside", "weights that become 0") + key("stairs", "quantized") + key("range", "±R");
  const { inputs: [weights, zone, bits], said, charts } = panel(box, controls, ["", "", "", ""], keys);
  const draw = () => {
    const quantiles = samples[weights.value].map((value) => value / 10000), last = quantiles.length - 1;
    const upTo = (place) => (1 - Math.cos((Math.PI * place) / last)) / 2; // the share of the weights up to a quantile
    const half = +zone.value, levels = 2 ** (bits.value - 1) - 1, step = (1 - half) / (levels - 0.5), shift = half - step / 2;
    const index = (w) => Math.sign(w) * Math.min(Math.max(Math.round(Math.max(Math.abs(w) - shift, 0) / step), 0), levels);
    const quantize = (w) => (Math.abs(w) <= half ? 0 : step * index(w) + shift * Math.sign(w));
    const below = (w) => { // the share of the weights that are at most w
      if (w < quantiles[0]) return 0;
      if (w >= quantiles[last]) return 1;
      let low = 0, high = last;
      while (high - low > 1) { const middle = (low + high) >> 1; if (quantiles[middle] <= w) low = middle; else high = middle; }
      return upTo(low) + ((w - quantiles[low]) / (quantiles[high] - quantiles[low] || 1)) * (upTo(high) - upTo(low));
    };
    const between = (low, high) => below(high) - below(low), zeros = between(-half, half);
    const held = Array.from({ length: 2 * levels + 1 }, (_, i) => i - levels).map((q) => {
      const inner = half + (Math.abs(q) - 1) * step, outer = Math.abs(q) === levels ? Infinity : inner + step;
      return [q ? step * q + shift * Math.sign(q) : 0, q === 0 ? zeros : q > 0 ? between(inner, outer) : between(-outer, -inner)];
    });
    const middles = quantiles.slice(1).map((value, i) => (value + quantiles[i]) / 2);
    const power = (values) => Math.sqrt(values.reduce((sum, value, i) => sum + value * value * (upTo(i + 1) - upTo(i)), 0));
    const error = power(middles.map((w) => quantize(w) - w)) / power(middles);
    const used = held.filter(([, share]) => share > 0).length;
    zone.nextElementSibling.value = `±${(+zone.value).toFixed(2)} R`;
    bits.nextElementSibling.value = bits.value;
    said.textContent = `Dead zone ±${tidy(half)} R, ${bits.value} bits: ${percent(zeros)} zeros, ${used} of ${2 * levels + 1} levels used, error ${percent(error)} (RMS of q(w) − w, over the RMS of w)`;
    const limit = 1.32, grid = Array.from({ length: 1321 }, (_, i) => -limit + i * 0.002);
    const ground = (X, Y, low, high) => rect("zone", -half, half, low, high, X, Y) + `<path class="range" d="M${X(-1)} ${Y(low)}V${Y(high)}M${X(1)} ${Y(low)}V${Y(high)}"/>`;
    chart(charts[0], { title: "Staircase", x: [-limit, limit], y: [-limit, limit], draw: (X, Y) =>
      ground(X, Y, -limit, limit) + `<path class="identity" d="${line([[-limit, -limit], [limit, limit]], X, Y)}"/><path class="stairs" d="${line(grid.map((w) => [w, quantize(w)]), X, Y)}"/>` });
    const edges = [-half, half, ...Array.from({ length: 62 }, (_, i) => -limit + i * limit / 30.5)].sort((a, b) => a - b);
    const bins = edges.slice(1).map((high, i) => [edges[i], high, 100 * between(edges[i], high) * (limit / 30.5) / Math.max(high - edges[i], 1e-9)]).filter(([low, high]) => high - low > 1e-9);
    const dead = ([low, high]) => low >= -half - 1e-9 && high <= half + 1e-9;
    const top = 1.08 * Math.max(...bins.map(([, , share]) => share));
    chart(charts[1], { title: "Weights", x: [-limit, limit], y: [0, top], unit: " %", draw: (X, Y) => ground(X, Y, 0, top) +
      ["inside", "outside"].map((kind) => `<path class="${kind}" d="${bins.filter((bin) => dead(bin) === (kind === "inside")).map(([low, high, share]) => bar(low, high, share, X, Y)).join("")}"/>`).join("") });
    const worst = 1.08 * Math.max(half, limit - 1, step / 2);
    chart(charts[2], { title: "Error q(w) − w", x: [-limit, limit], y: [-worst, worst], xlabel: "weight / R", draw: (X, Y) =>
      ground(X, Y, -worst, worst) + `<path class="stairs" d="${line(grid.map((w) => [w, quantize(w) - w]), X, Y)}"/>` });
    const most = 100 * Math.max(...held.filter(([level]) => level).map(([, share]) => share)), full = 1.25 * Math.max(most, Math.min(100 * zeros, 2 * most)), wide = Math.min(0.02, step / 3);
    chart(charts[3], { title: "Quantized", x: [-limit, limit], y: [0, full], unit: " %", xlabel: "weight / R", draw: (X, Y) =>
      ["inside", "outside"].map((kind) => `<path class="${kind}" d="${held.filter(([level]) => !level === (kind === "inside")).map(([level, share]) => bar(level - wide, level + wide, Math.min(100 * share, full), X, Y)).join("")}"/>`).join("") +
      (100 * zeros > full ? `<text x="${X(wide) + 5}" y="${Y(full) + 12}">↑ ${percent(zeros)} are 0</text>` : "") });
  };
  chosen.push((layer) => { if (samples[`trained: ${layer}`]) { weights.value = `trained: ${layer}`; draw(); } });
  weights.addEventListener("input", () => { if (weights.value.startsWith("trained: ")) show(weights.value.slice(9), draw); });
  return [[weights, zone, bits], draw];
};

const layers = (box, { layers: courses, start, reach }) => {
  const epochs = courses[start].map((one) => one.epoch), last = epochs.length - 1;
  const controls = [["layer", menu(Object.keys(courses), start)], ["epoch", slider(0, last, 1, last)]];
  const keys = key("zone", "dead zone") + key("outside", "weights") + key("inside", "weights that become 0") + key("range", "±R") + key("level", "levels") + key("zeros", "zeros") + key("bits", "bits (right)");
  const { inputs: [layer, epoch], said, charts } = panel(box, controls, ["whole", "", ""], keys);
  const play = document.createElement("button");
  play.type = "button";
  box.querySelector(".controls").append(play);
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶ Play"; };
  stop();
  play.addEventListener("click", () => {
    if (timer) return stop();
    let at = +epoch.value === last ? -1 : +epoch.value;
    const next = () => { epoch.value = ++at; draw(); if (at >= last) stop(); };
    play.textContent = "❚❚ Pause";
    timer = setInterval(next, 300);
    next();
  });
  const draw = () => {
    const course = courses[layer.value], now = course[epoch.value], filters = now.dead.length;
    const killed = (one) => [...one.dead].filter((flag) => flag === "1").length;
    epoch.nextElementSibling.value = now.epoch || "before training";
    said.textContent = `${layer.value} ${now.epoch ? `after epoch ${now.epoch}` : "before training"}: ${percent(now.zeros)} zeros, ${killed(now)} of ${filters} filters dead, ${now.bits} bits`;
    const inner = now.counts.slice(1, -1), total = now.counts.reduce((a, b) => a + b) || 1, wide = 2 * reach / inner.length;
    const shares = inner.map((count) => 100 * count / total), middle = (inner.length - 1) / 2;
    const dead = (i) => Math.abs(i - middle) * wide <= now.zone;
    const most = Math.max(...shares), others = Math.max(0, ...shares.filter((_, i) => !dead(i)));
    const top = 1.2 * (Math.min(most, 5 * others) || most || 1);
    const levels = 2 ** (now.bits - 1) - 1, step = (1 - now.zone) / (levels - 0.5);
    const sides = Array.from({ length: levels }, (_, i) => now.zone + (i + 0.5) * step);
    chart(charts[0], { title: `Weights, and ${2 * levels + 1} levels`, x: [-reach, reach], y: [0, top], height: 250, unit: " %", xlabel: "weight, in units of the layer's range R", draw: (X, Y) =>
      rect("zone", -now.zone, now.zone, 0, top, X, Y) +
      ["inside", "outside"].map((kind) => `<path class="${kind}" d="${shares.map((share, i) => (dead(i) === (kind === "inside") ? bar(-reach + i * wide, -reach + (i + 1) * wide, Math.min(share, top), X, Y) : "")).join("")}"/>`).join("") +
      `<path class="range" d="M${X(-1)} ${Y(0)}V${Y(top)}M${X(1)} ${Y(0)}V${Y(top)}"/><path class="level" d="${[0, ...sides, ...sides.map((w) => -w)].map((w) => `M${X(w)} ${Y(0)}v5`).join("")}"/>` +
      (most > top ? `<text x="${X(now.zone) + 6}" y="${Y(top) + 12}">↑ ${percent(now.zeros)} become 0</text>` : "") });
    const edges = epochs.map((at, i) => (i ? (at + epochs[i - 1]) / 2 : at - 0.5)).concat(epochs[last] + 0.5), span = [edges[0], edges[last + 1]];
    const here = (X, Y, low, high) => `<path class="here" d="M${X(now.epoch)} ${Y(low)}V${Y(high)}"/>`;
    const cell = (X, Y, i, row) => `M${X(edges[i])} ${Y(row - 0.5)}H${X(edges[i + 1])}V${Y(row + 0.5)}H${X(edges[i])}Z`;
    chart(charts[1], { title: course.some(killed) ? "Filters: black is dead" : "Filters: none dies", x: span, y: [filters - 0.5, -0.5], xlabel: "epoch", draw: (X, Y) =>
      rect("alive", span[0], span[1], filters - 0.5, -0.5, X, Y) + `<path class="dead" d="${course.map((one, i) => [...one.dead].map((flag, row) => (flag === "1" ? cell(X, Y, i, row) : "")).join("")).join("")}"/>` + here(X, Y, filters - 0.5, -0.5) });
    const high = Math.max(8, ...course.map((one) => one.bits)), scale = (bits) => 100 * bits / high;
    const stairs = course.flatMap((one, i) => [[epochs[i], scale(one.bits)], [epochs[i + 1] ?? epochs[i], scale(one.bits)]]);
    chart(charts[2], { title: "Zeros and bits", x: span, y: [0, 106], unit: " %", xlabel: "epoch", right: [0, high / 4, high / 2, 3 * high / 4, high].map((bits) => [scale(bits), tidy(bits)]), draw: (X, Y) =>
      `<path class="bits" d="${line(stairs, X, Y)}"/><path class="zeros" d="${line(course.map((one, i) => [epochs[i], 100 * one.zeros]), X, Y)}"/>` + here(X, Y, 0, 106) });
  };
  chosen.push((name) => { if (courses[name]) { layer.value = name; draw(); } });
  layer.addEventListener("input", () => show(layer.value, draw));
  epoch.addEventListener("pointerdown", stop);
  return [[layer, epoch], draw];
};

const pictures = (box, { control, start, pictures: kept }) => {
  const { inputs: [which], charts: [place] } = panel(box, [[control, menu(Object.keys(kept), start)]], ["picture"], "");
  const draw = () => {
    const { svg, alt } = kept[which.value];
    place.innerHTML = `<img alt="${escaped(alt)}" src="data:image/svg+xml,${encodeURIComponent(svg)}">`;
  };
  chosen.push((name) => { if (kept[name]) { which.value = name; draw(); } });
  which.addEventListener("input", () => show(which.value, draw));
  return [[which], draw];
};

// The same layer in all explorers.
const show = (layer, own) => { own(); for (const follow of chosen) follow(layer); };

for (const box of document.querySelectorAll(".explorer")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const [inputs, draw] = { quantizer, layers, pictures }[data.kind](box, data);
  box.nextElementSibling.hidden = true; // the saved figure
  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };
  for (const input of inputs) input.addEventListener("input", soon);
  window.addEventListener("resize", soon);
  draw();
}

// Values under the pointer: the nearest epoch of every line of the chart.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const charts = JSON.parse(figure.dataset.hover), image = figure.querySelector("img");
  figure.addEventListener("pointermove", (event) => {
    const area = image.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
    const found = charts.find(({ box: [left, top, width, height] }) => x >= left && x <= left + width && y >= top && y <= top + height);
    tip.hidden = !found;
    if (!found) return;
    const at = found.limits[0] + ((x - found.box[0]) / found.box[2]) * (found.limits[1] - found.limits[0]);
    const nearest = (xs) => xs.reduce((best, value, i) => (Math.abs(value - at) < Math.abs(xs[best] - at) ? i : best), 0);
    const own = found.lines.filter((one) => one.x.length > 2), epoch = (own[0] ?? found.lines[0]).x;
    const rows = own.map((one) => [one.name, tidy(one.y[nearest(one.x)]) + one.unit]);
    tip.innerHTML = `<b>epoch ${epoch[nearest(epoch)]}</b>${rows.map(([name, value]) => `<span>${escaped(name)}</span><span>${value}</span>`).join("")}`;
    const right = event.clientX > window.innerWidth / 2;
    tip.style.cssText = `top: ${event.clientY + 14}px; ${right ? `right: ${document.documentElement.clientWidth - event.clientX + 14}px` : `left: ${event.clientX + 14}px`}`;
  });
  figure.addEventListener("pointerleave", () => { tip.hidden = true; });
}

// Every piece of code can be copied.
for (const code of document.querySelectorAll(".input, .prose pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.querySelector("pre, code").textContent.trimEnd() + "\n");
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  const frame = document.createElement("div");
  frame.className = "copied";
  code.replaceWith(frame);
  frame.append(code, button);
}

// A table whose rows are cards on a phone: each cell with the name of its column.
for (const table of document.querySelectorAll("table.cards")) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { cell.dataset.label = names[i]; });
}
