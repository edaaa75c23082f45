"use strict";
/* The page says all it has to say without this script, which adds tips, zoom, sorting, and opens what is folded for print. */
(() => {
  const SVG = document.querySelector("svg").namespaceURI;

  /* What the pointer is on. */
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  const point = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (event.clientY > box.height + 24 ? event.clientY - box.height - 12 : event.clientY + 20) + "px";
  };
  for (const name of ["pointermove", "pointerdown"]) document.addEventListener(name, point);
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);

  /* A logarithmic axis: `start` and `end` are places between 0 and 1 of the whole range. */
  const zoom = (chart) => {
    const plot = chart.querySelector(".plot");
    const low = Number(plot.dataset.from), high = Number(plot.dataset.to);
    const bins = plot.viewBox.baseVal.width;
    const base = plot.y.baseVal.value + plot.height.baseVal.value;
    let start = 0, end = 1;
    const value = (place) => low * Math.pow(high / low, place);
    const place = (found) => Math.log(found / low) / Math.log(high / low);
    const add = (kind, attributes, text) => {
      const made = document.createElementNS(SVG, kind);
      for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
      if (text) made.textContent = text;
      return chart.appendChild(made);
    };
    const show = (from, to) => {
      const middle = (from + to) / 2, half = Math.max(to - from, 4 / bins) / 2;
      start = Math.max(0, middle - half);
      end = Math.min(1, middle + half);
      plot.setAttribute("viewBox", [start * bins, 0, (end - start) * bins, 100].join(" "));
      for (const old of chart.querySelectorAll(".tick, .tick-mark")) old.remove();
      for (const peak of chart.querySelectorAll("[data-at]")) {
        const along = (place(Number(peak.dataset.at)) - start) / (end - start);
        peak.setAttribute("x", 100 * along + "%");
        peak.setAttribute("visibility", along < 0 || along > 1 ? "hidden" : "visible");
      }
      const first = value(start), last = value(end), least = (last - first) / 8, size = Math.pow(10, Math.floor(Math.log10(least)));
      const step = [1, 2, 5, 10].map((factor) => factor * size).find((found) => found >= least * 0.999);
      let labelled = -1;
      for (let number = Math.ceil(first / step - 1e-9); number * step <= last * (1 + 1e-9); number += 1) {
        const along = (place(number * step) - start) / (end - start), x = 100 * along + "%";
        const anchor = along < 0.06 ? "start" : along > 0.94 ? "end" : "middle";
        add("line", { class: "tick-mark", x1: x, x2: x, y1: base, y2: base + 5 });
        if (along - labelled < 0.18) continue;
        labelled = along;
        add("text", { class: "tick", x, y: base + 16, "text-anchor": anchor }, Number((number * step).toPrecision(6)) + " ms");
      }
    };
    const tools = document.createElement("div");
    tools.className = "tools";
    const narrower = () => show(start + (end - start) / 4, end - (end - start) / 4);
    const wider = () => show(start - (end - start) / 2, end + (end - start) / 2);
    for (const [text, label, action] of [["+", "zoom in", narrower], ["\u2212", "zoom out", wider], ["all", "show all", () => show(0, 1)]]) {
      const button = tools.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-label", label);
      button.addEventListener("click", action);
    }
    tools.appendChild(document.createElement("span")).textContent = "or drag across the chart";
    chart.after(tools);

    let begun = null, chosen = null;
    const along = (event) => {
      const box = chart.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    };
    plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button) return;
      event.preventDefault();
      begun = along(event);
      chosen = add("rect", { class: "chosen", x: 100 * begun + "%", y: plot.y.baseVal.value, width: 0, height: plot.height.baseVal.value });
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      if (begun === null) return;
      chosen.setAttribute("x", 100 * Math.min(begun, along(event)) + "%");
      chosen.setAttribute("width", 100 * Math.abs(along(event) - begun) + "%");
    });
    for (const name of ["pointerup", "pointercancel"]) {
      plot.addEventListener(name, (event) => {
        if (begun === null) return;
        const ends = [begun, along(event)].sort((a, b) => a - b).map((found) => start + found * (end - start));
        chosen.remove();
        begun = null;
        if (name === "pointerup" && ends[1] - ends[0] > 0.01 * (end - start)) show(ends[0], ends[1]);
      });
    }
    plot.addEventListener("dblclick", () => show(0, 1));
  };
  document.querySelectorAll(".zoom").forEach(zoom);

  /* Tables that can be sorted by a click on a heading. */
  const key = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value || cell.textContent.trim(), number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  const sortable = (table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.classList.contains("wide")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const rising = head.getAttribute("aria-sort") === "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const body = table.tBodies[0], sign = rising ? 1 : -1;
        const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
        body.append(...[...body.rows].sort((a, b) => sign * order(key(a, column), key(b, column))));
      });
    });
  };
  document.querySelectorAll("table.sortable").forEach(sortable);

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
