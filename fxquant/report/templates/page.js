"use strict";
// What other widths would use and lose, from the file's cost table; the sums are those of allocators/problem/usage.py.
(() => {
  const data = JSON.parse(document.getElementById("choices").textContent);
  const { table, columns, pinned, widest, names, places, limits, means, loss } = data;
  const chosen = columns.map((row) => [...row]);
  const layers = table.layers;
  const isProduct = table.roles.map((role) => role === "qk" || role === "av");
  const isWeight = (side, layer) => side === 0 && !isProduct[layer];
  const get = (id) => document.getElementById(id);
  const width = (at, side, layer) => (at[side][layer] < 0 ? 0 : table.bits[at[side][layer]]);
  const has = (side, layer) => table.elements[side][layer] > 0;

  function usage(at) {
    const sums = { weight: [0, 0], activation: [0, 0] };
    let bytes = 0, operations = 0, lost = 0, latency = 0;
    layers.forEach((_, layer) => {
      const bits = [0, 1].map((side) => width(at, side, layer));
      const counted = bits.map((value, side) => value || table.fixed_bits[side][layer]);
      if (table.tied[layer]) counted[0] = counted[1];
      operations += table.macs[layer] * counted[0] * counted[1];
      [0, 1].forEach((side) => {
        const elements = table.elements[side][layer];
        if (!elements) return;
        const kind = isWeight(side, layer) ? "weight" : "activation";
        const share = means[kind === "weight" ? 0 : 1] === "layers" ? 1 : elements;
        sums[kind][0] += share * bits[side];
        sums[kind][1] += share;
        if (kind === "weight") bytes += (elements * bits[side]) / 8;
        lost += table.cost[side][layer][at[side][layer]];
      });
      if (table.latency_ms) {
        const place = [0, 1].map((side) => Math.max(at[side][layer], 0));
        latency += table.latency_ms[layer][place[0]][place[1]];
      }
    });
    const mean = ([total, count]) => (count ? total / count : null);
    return {
      loss: lost, mean_weight_bits: mean(sums.weight), mean_activation_bits: mean(sums.activation),
      weight_bytes: bytes, bit_operations: operations, latency_ms: table.latency_ms ? latency : null,
    };
  }

  const shown = {
    loss: [loss, (v) => v.toPrecision(3)],
    mean_weight_bits: ["Mean weight bits", (v) => v.toFixed(3)],
    mean_activation_bits: ["Mean activation bits", (v) => v.toFixed(3)],
    weight_bytes: ["Quantized weights", (v) => `${(v / 1e6).toPrecision(4)} MB`],
    bit_operations: ["Bit operations", (v) => `${(v / 1e9).toPrecision(4)} G`],
    latency_ms: ["Predicted latency", (v) => `${v.toPrecision(3)} ms`],
  };
  const before = usage(columns);

  function make(tag, text, className) {
    const found = document.createElement(tag);
    if (text !== undefined) found.textContent = text;
    if (className) found.className = className;
    return found;
  }

  function showUsage() {
    const now = usage(chosen);
    get("usage").replaceChildren(...Object.entries(shown).filter(([key]) => now[key] !== null).map(([key, [name, write]]) => {
      const line = make("div"), value = make("dd");
      const limit = limits[key];
      const over = limit !== undefined && now[key] > limit * (1 + 1e-9);
      const number = make("span", write(now[key]), over ? "over" : "");
      number.dataset.usage = key;
      number.dataset.value = now[key];
      value.append(number);
      const notes = [];
      if (now[key] !== before[key]) notes.push(`was ${write(before[key])}`);
      if (limit !== undefined) notes.push(over ? `over the budget of ${write(limit)}` : `of ${write(limit)}`);
      value.append(make("span", notes.join(", "), over ? "over" : "before"));
      line.append(make("dt", name), value);
      return line;
    }));
  }

  // Overrides of what was changed, and of what was pinned before, which would be free again without them.
  function overrides() {
    const found = [];
    layers.forEach((layer, index) => {
      const wanted = [0, 1].map((side) =>
        has(side, index) && (pinned[side][index] || chosen[side][index] !== columns[side][index])
          ? width(chosen, side, index) : null);
      if (isProduct[index]) {
        [0, 1].forEach((side) => wanted[side] !== null && found.push([names[side][index], wanted[side]]));
      } else if (wanted[0] !== null || wanted[1] !== null) {
        // A layer without a weight takes one width: a pair would ask for a weight it does not have.
        found.push([layer, places[0][index] === "weight" && has(0, index) ? wanted : wanted[1]]);
      }
    });
    return found;
  }
  const python = (bits) => (Array.isArray(bits) ? `(${bits.map((b) => b ?? "None").join(", ")})` : `${bits}`);
  const command = (bits) => (Array.isArray(bits) ? bits.map((b) => b ?? "-").join("/") : `${bits}`);
  const quoted = (text) => (/^[\w./=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

  function showOverrides() {
    const changed = [0, 1].some((side) => layers.some((_, layer) => chosen[side][layer] !== columns[side][layer]));
    get("overrides").hidden = !changed;
    const found = overrides();
    get("override-python").textContent = `overrides={${found.map(([n, b]) => `${JSON.stringify(n)}: ${python(b)}`).join(", ")}}`;
    get("override-command").textContent = found.map(([n, b]) => `--override ${quoted(`${n}=${command(b)}`)}`).join(" ");
  }

  const cells = new Map([...document.querySelectorAll(".cell")].map((cell) => [cell.dataset.layer, cell]));
  const widthClass = (bits) => `width b${Math.min(Math.max(bits, 2), 8)}`;

  function showCell(layer) {
    const cell = cells.get(layers[layer]);
    if (!cell) return;
    const halves = cell.querySelectorAll(".width");
    const bits = [0, 1].map((side) => (has(side, layer) ? width(chosen, side, layer) : null));
    const set = (half, text, colour) => { half.textContent = text; half.className = widthClass(colour); };
    if (isProduct[layer]) {
      const known = bits.filter((b) => b !== null);
      if (known.length) set(halves[1], [...new Set(known)].join("x"), Math.min(...known));
    } else {
      bits.forEach((b, side) => b !== null && set(halves[side], `${b}`, b));
    }
    const isChanged = [0, 1].some((side) => chosen[side][layer] !== columns[side][layer]);
    cell.classList.toggle("changed", isChanged);
    cell.setAttribute("aria-label", `${layers[layer]}: weight ${halves[0].textContent}, input ${halves[1].textContent} bits${isChanged ? ", changed" : ""}`);
  }

  // The picture of a table's operand: of a weight layer and of a product in their order, of tied inputs the first.
  function picture(side, layer) {
    const only = !has(0, layer) && document.querySelectorAll(`[data-operand="${CSS.escape(layers[layer])} 1"]`).length === 0;
    const index = side === 0 || only ? 0 : 1;
    const found = document.querySelector(`[data-operand="${CSS.escape(`${layers[layer]} ${index}`)}"]`);
    return found && found.querySelector("svg") ? [...found.children].map((child) => child.cloneNode(true)) : [];
  }

  function choice(side, layer, column) {
    const label = make("label"), input = make("input"), bits = table.bits[column];
    input.type = "radio";
    input.name = `bits-${side}`;
    input.value = bits;
    input.checked = chosen[side][layer] === column;
    input.disabled = column > widest[side][layer];
    const cost = table.cost[side][layer][column], ratio = table.sqnr_db[side][layer][column];
    input.setAttribute("aria-label", `${bits} bits: loss ${cost.toPrecision(2)}, ${ratio.toFixed(1)} dB`);
    label.title = `${bits} bits: loss ${cost.toPrecision(3)}, ${ratio.toFixed(1)} dB`;
    input.addEventListener("change", () => {
      chosen[side][layer] = column;
      showCell(layer);
      showUsage();
      showOverrides();
      get("said").textContent = `${names[side][layer]} at ${bits} bits: ${loss.toLowerCase()} ${usage(chosen).loss.toPrecision(3)}`;
    });
    label.append(input, make("span", `${bits}`, widthClass(bits)), make("span", cost.toExponential(0), "cost"));
    return label;
  }

  function edit(name) {
    cells.forEach((cell, layer) => (layer === name ? cell.setAttribute("aria-current", "true") : cell.removeAttribute("aria-current")));
    const layer = layers.indexOf(name);
    get("editor-name").textContent = name;
    const sides = layer < 0 ? [] : [0, 1].filter((side) => has(side, layer));
    get("editor-empty").hidden = sides.length > 0;
    get("editor-empty").textContent = "The widths of this layer are no choice: it reads an image, or stays float.";
    get("editor-operands").replaceChildren(...sides.map((side) => {
      const set = make("fieldset");
      const place = table.tied[layer] ? "both inputs" : places[side][layer] === "activation" ? "input" : places[side][layer];
      const isPinned = pinned[side][layer] ? ", pinned" : "";
      set.append(make("legend", `${place[0].toUpperCase()}${place.slice(1)}, ${table.elements[side][layer].toLocaleString("en")} elements${isPinned}`));
      set.append(...picture(side, layer));
      const widths = make("div", undefined, "widths");
      widths.append(...table.bits.map((_, column) => choice(side, layer, column)));
      set.append(widths);
      return set;
    }));
  }

  cells.forEach((cell, name) => cell.addEventListener("click", (event) => {
    event.preventDefault();
    edit(name);
    const editor = get("layer-editor");
    editor.focus({ preventScroll: true });
    editor.scrollIntoView({ block: "nearest" });
  }));
  get("reset").addEventListener("click", () => {
    columns.forEach((row, side) => row.forEach((column, layer) => { chosen[side][layer] = column; }));
    layers.forEach((_, layer) => showCell(layer));
    showUsage();
    showOverrides();
    const open = get("editor-name").textContent;
    if (layers.includes(open)) edit(open);
    get("said").textContent = "All changes are undone.";
  });
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    const text = get(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {  // a page from a file may not have the clipboard: select the text, which one key copies
      getSelection().selectAllChildren(text);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
  document.documentElement.classList.add("scripted");
  showUsage();
  showOverrides();
})();
