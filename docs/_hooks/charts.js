(() => {
  "use strict";
  const OURS = "hvae_kernels", COPY = "copy";
  const runs = JSON.parse(document.getElementById("chart-data").textContent);
  const pick = Object.fromEntries(["op", "size", "direction", "run", "measure"].map(
    name => [name, document.getElementById(`chart-${name}`)]));
  const bars = document.getElementById("chart-bars"), note = document.getElementById("chart-note");
  const unique = values => [...new Set(values)];
  const shown = text => text.replace("+", " + ");

  const digits = x => Number(x.toPrecision(3)).toString();
  const duration = us => us < 1e3 ? `${digits(us)} µs` : us < 1e6 ? `${digits(us / 1e3)} ms` : `${digits(us / 1e6)} s`;

  // Keeps the choice where the new list still has it.
  function fill(select, entries) {
    const before = select.value;
    select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
    if (entries.some(([value]) => value === before)) select.value = before;
  }

  function row(kind, name, width, value) {
    const element = document.createElement("div");
    element.className = `charts-row ${kind}`;
    element.innerHTML = '<span class="charts-name"></span><span class="charts-track">'
      + '<span class="charts-bar"></span><span class="charts-value"></span></span>';
    element.querySelector(".charts-name").textContent = name;
    element.querySelector(".charts-bar").style.width = `${(65 * width).toFixed(2)}%`;
    element.querySelector(".charts-value").textContent = value;
    return element;
  }

  const kindOf = name => name === OURS ? "ours" : name.startsWith(COPY) ? "limit" : "rival";

  function measured(records, measure) {
    const ours = records.find(r => r.name === OURS);
    const rivals = records.filter(r => r.name !== OURS && !r.name.startsWith(COPY));
    if (measure === "ratio") return rivals.map(r => {
      const ratio = r.p20_us / ours.p20_us;
      return [`than ${r.name}`, ratio, `${digits(ratio)}×${ratio < 1 ? " (slower)" : ""}`];
    });
    if (measure === "share") return [ours, ...rivals].map(
      r => [r.name, r.share_of_copy, `${digits(100 * r.share_of_copy)} %`]);
    return [ours, ...rivals, ...records.filter(r => r.name === COPY)].map(r => [r.name, r.p20_us, duration(r.p20_us)]);
  }

  function draw() {
    const run = runs[pick.run.value];
    const records = run.records.filter(
      r => r.op === pick.op.value && r.size === pick.size.value && r.direction === pick.direction.value);
    const entries = measured(records, pick.measure.value);
    const widest = Math.max(...entries.map(([, value]) => value), pick.measure.value === "share" ? 1 : 0);
    bars.replaceChildren(...entries.map(
      ([name, value, text]) => row(kindOf(name), name === OURS ? "ours" : name, value / widest, text)));
    if (!entries.length) bars.textContent = "At this size nothing else was timed: unrolled, the formula takes minutes to compile.";
    bars.setAttribute("aria-label", entries.map(([name, , text]) => `${name}: ${text}`).join("; "));
    const ours = records.find(r => r.name === OURS);
    const extra = ours.saved_bytes === undefined ? "" : ` Kept for the backward pass: ${digits(ours.saved_bytes / 1e3)} kB.`;
    note.textContent = `Ours moves ${digits(ours.gbytes_per_s)} GB/s and computes ${digits(ours.gflops_per_s)} GFLOP/s, `
      + `counting what the op needs at least.${extra} ${run.device}, ${run.set}; ${run.origins[ours.origin]}.`;
  }

  function update() {
    const run = runs[pick.run.value];
    fill(pick.op, unique(run.records.map(r => r.op)).map(x => [x, x]));
    const ofOp = run.records.filter(r => r.op === pick.op.value);
    fill(pick.size, unique(ofOp.map(r => r.size)).map(x => [x, x]));
    const ofSize = ofOp.filter(r => r.size === pick.size.value);
    fill(pick.direction, unique(ofSize.map(r => r.direction)).map(x => [x, shown(x)]));
    draw();
  }

  fill(pick.run, runs.map((run, i) => [String(i), `${run.device}: ${run.set}`]));
  Object.values(pick).forEach(select => select.addEventListener("change", update));
  update();
})();
