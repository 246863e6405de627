// The routing explorer: tokens shaded by how many experts they took; hover, focus or tap shows which, per layer.
// One token of one layer is [number of experts, expert, weight, expert, weight, ...], heaviest first.
"use strict";
const Explorer = (() => {
  const pairs = (row) => {
    const found = [];
    for (let i = 1; i + 1 < row.length; i += 2) found.push([row[i], row[i + 1]]);
    return found;
  };
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const shownPiece = (piece, isFirst, side) => {
    if (piece === "</s>") return side === "target" && isFirst ? "⟨start⟩" : "⟨end⟩";
    return piece.replace(/^\u2581/, "").replace(/@@$/, "") || "\u2423";
  };
  const layersOf = (sentence, side) =>
    Object.keys(sentence.routing).filter((name) => name.startsWith(side === "source" ? "encoder" : "decoder"));

  // Mean number of experts over the chosen layers of the token's stack; null where that stack has none.
  function taken(sentence, side, index, layer) {
    const names = layersOf(sentence, side).filter((name) => layer === "" || name === layer);
    if (!names.length) return null;
    return names.reduce((sum, name) => sum + sentence.routing[name][index][0], 0) / names.length;
  }

  function detail(sentence, side, index, layer) {
    const piece = sentence[side][index];
    const box = document.createDocumentFragment();
    box.append(element("h4", {}, `${shownPiece(piece, index === 0, side)}  (${piece})`));
    const names = layersOf(sentence, side);
    if (!names.length) box.append("This side has no mixture-of-experts layer.");
    for (const name of names) {
      const row = sentence.routing[name][index];
      const line = element("div", { class: "experts" + (name === layer ? " current" : ""), "data-layer": name });
      line.append(`${name}: ${row[0]} expert${row[0] === 1 ? "" : "s"}  `);
      for (const [expert, weight] of pairs(row)) {
        line.append(element("span", { "data-expert": expert, "data-weight": weight }, `#${expert} ${weight.toFixed(3)}`), " ");
      }
      const hidden = row[0] - pairs(row).length;
      if (hidden > 0) line.append(`and ${hidden} lighter`);
      box.append(line);
    }
    return box;
  }

  function popup() {
    let box = document.getElementById("token-detail");
    if (!box) {
      box = element("div", { id: "token-detail", role: "tooltip", hidden: "" });
      document.body.append(box);
      document.addEventListener("keydown", (event) => { if (event.key === "Escape") box.hidden = true; });
    }
    return box;
  }

  function show(button, sentence, side, index, layer) {
    const box = popup();
    document.querySelectorAll(".token[aria-expanded]").forEach((token) => token.removeAttribute("aria-expanded"));
    button.setAttribute("aria-expanded", "true");
    button.setAttribute("aria-describedby", "token-detail");
    box.replaceChildren(detail(sentence, side, index, layer));
    box.hidden = false;
    const place = button.getBoundingClientRect();
    const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(8, left) + window.scrollX}px`;
    const below = place.bottom + 6 + box.offsetHeight <= window.innerHeight;
    box.style.top = `${(below ? place.bottom + 6 : Math.max(0, place.top - box.offsetHeight - 6)) + window.scrollY}px`;
  }

  function hide(button) {
    popup().hidden = true;
    button.removeAttribute("aria-expanded");
  }

  function tokenRow(sentence, side, layer, most) {
    const row = element("p", { class: "tokens", role: "group", "aria-label": `${side} tokens` });
    row.append(element("span", { class: "label" }, side));
    sentence[side].forEach((piece, index) => {
      const count = taken(sentence, side, index, layer);
      const continues = index > 0 && !piece.startsWith("\u2581") && piece !== "</s>" && !(index === 1 && side === "target");
      const text = shownPiece(piece, index === 0, side);
      const button = element("button", {
        type: "button", class: continues ? "token" : "token start", tabindex: index === 0 ? "0" : "-1",
        "data-side": side, "data-index": index,
        style: `--share:${count === null ? 0 : (count / most).toFixed(3)}`,
        "aria-label": count === null ? text : `${text}: ${count.toFixed(1)} experts`,
      }, text);
      if (count !== null) button.append(element("small", {}, Number.isInteger(count) ? String(count) : count.toFixed(1)));
      const open = () => show(button, sentence, side, index, layer);
      button.addEventListener("pointerenter", open);
      button.addEventListener("focus", open);
      button.addEventListener("click", open);
      button.addEventListener("pointerleave", () => { if (document.activeElement !== button) hide(button); });
      button.addEventListener("blur", () => hide(button));
      row.append(button);
    });
    row.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const all = [...row.querySelectorAll(".token")];
      const next = all[all.indexOf(document.activeElement) + step];
      if (next) { all.forEach((token) => { token.tabIndex = -1; }); next.tabIndex = 0; next.focus(); event.preventDefault(); }
    });
    return row;
  }

  function mostExperts(sentences, layer) {
    let most = 1;
    for (const sentence of sentences) {
      for (const side of ["source", "target"]) {
        sentence[side].forEach((_, index) => { most = Math.max(most, taken(sentence, side, index, layer) || 0); });
      }
    }
    return most;
  }

  function card(sentence, layer, most) {
    const made = element("article", { class: "card", "data-id": sentence.id ?? 0 });
    made.append(tokenRow(sentence, "source", layer, most), tokenRow(sentence, "target", layer, most));
    for (const [name, text] of [["translation", sentence.translation], ["reference", sentence.reference]]) {
      if (text) made.append(element("p", {}, element("span", { class: "label" }, name), text));
    }
    return made;
  }

  // root: element to fill. options.filter: offer a search field.
  function mount(root, sentences, options = {}) {
    const layers = sentences.length ? Object.keys(sentences[0].routing) : [];
    const list = element("div");
    const search = element("input", { type: "search", placeholder: "a word, or a number" });
    const choose = element("select", {}, element("option", { value: "" }, "mean of all layers"));
    layers.forEach((name) => choose.append(element("option", { value: name }, name)));
    const status = element("span", { class: "muted", role: "status" });
    const controls = element("div", { class: "controls" });
    if (options.filter) controls.append(element("label", {}, "sentences with", search));
    controls.append(element("label", {}, "shade by", choose));
    controls.append(element("span", { class: "hint" }, "few experts ", element("span", { class: "scale", "aria-hidden": "true" }), " many"), status);
    const draw = () => {
      const wanted = search.value.trim().toLowerCase();
      const found = sentences.filter((s) => !wanted || String(s.id) === wanted
        || [s.source.join("").replaceAll("\u2581", " "), s.translation, s.reference].some((text) => (text || "").toLowerCase().includes(wanted)));
      const most = mostExperts(sentences, choose.value);
      popup().hidden = true;
      list.replaceChildren(...found.map((sentence) => card(sentence, choose.value, most)));
      if (options.filter) status.textContent = `${found.length} of ${sentences.length} sentences`;
    };
    search.addEventListener("input", draw);
    choose.addEventListener("change", draw);
    root.replaceChildren(controls, list);
    draw();
  }
  return { mount };
})();
