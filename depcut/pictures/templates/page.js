"use strict";
(() => {
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const byId = (id) => document.getElementById(id);
  const element = (tag, text, parent) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };

  // Links to the sections, and light or dark.
  for (const section of all(".section")) {
    const link = element("a", section.querySelector("h2").textContent, document.querySelector("nav"));
    link.href = "#" + section.id;
    link.addEventListener("click", () => { section.open = true; });
  }
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Rows of repeated layers.
  const unfold = (body, open) => {
    body.classList.toggle("open", open);
    body.querySelector(".unfold").setAttribute("aria-expanded", String(open));
  };
  for (const button of all(".unfold")) {
    const body = button.closest("tbody");
    button.addEventListener("click", () => unfold(body, !body.classList.contains("open")));
  }

  // The graph: moved and scaled by one transform.
  const svg = byId("graph");
  const data = svg ? JSON.parse(byId("data").textContent) : { tensors: [], boxes: {} };
  const lines = all(".line");
  const view = { x: 0, y: 0, scale: 1 };
  const draw = () => {
    byId("view").setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
  };
  const zoom = (factor, x, y) => {
    const scale = Math.min(4, Math.max(0.04, view.scale * factor));
    view.x = x - (x - view.x) * (scale / view.scale);
    view.y = y - (y - view.y) * (scale / view.scale);
    view.scale = scale;
    draw();
  };
  const fit = () => {
    const { clientWidth, clientHeight } = svg;
    if (!clientWidth) return;
    const [width, height] = [Number(svg.dataset.width), Number(svg.dataset.height)];
    // A tall graph is read from above: its width fits, its height is moved along.
    view.scale = Math.min(1.2, Math.max(Math.min(clientWidth / width, clientHeight / height),
      Math.min(clientWidth / width, 0.62)));
    view.x = (clientWidth - width * view.scale) / 2;
    view.y = Math.max(0, (clientHeight - height * view.scale) / 2);
    draw();
  };
  const center = (box) => {
    const [, x, y] = box.getAttribute("transform").match(/translate\(([-\d.]+)[ ,]([-\d.]+)\)/).map(Number);
    const rect = box.querySelector("rect");
    view.scale = Math.max(view.scale, 0.8);
    view.x = svg.clientWidth / 2 - (x + rect.width.baseVal.value / 2) * view.scale;
    view.y = svg.clientHeight / 2 - (y + 20) * view.scale;
    draw();
  };

  const membersOf = (item, parent) => {
    const list = element("ul", undefined, parent);
    for (const [tensor, dim, reads] of item[3]) {
      const entry = element("li", undefined, list);
      element("code", data.tensors[tensor], entry);
      element("span", ` dimension ${dim}, ${reads ? "reads" : "narrowed"}`, entry).className = "what";
    }
  };
  const choose = (id) => {
    for (const box of all(".box")) box.classList.toggle("chosen", box.id === id);
    for (const line of lines) {
      line.classList.toggle("lit", line.dataset.from === id || line.dataset.to === id);
    }
    const panel = byId("detail");
    panel.replaceChildren();
    panel.hidden = !id;
    if (!id) return;
    const detail = data.boxes[id];
    element("h3", detail.title, panel);
    const close = element("button", "✕", panel);
    close.className = "close";
    close.type = "button";
    close.title = "Close";
    close.addEventListener("click", () => choose(""));
    if (detail.kind === "layer") {
      const list = element("ul", undefined, panel);
      for (const [name, shape, now] of detail.items) {
        const entry = element("li", undefined, list);
        element("code", name, entry);
        element("div", shape === now ? shape : `${shape} → ${now}`, entry).className = "what";
      }
      return;
    }
    for (const item of detail.items) {
      const [name, units, kept] = item;
      const counts = kept === units ? `${units} units` : `${kept} of ${units} units stay`;
      const one = element("details", undefined, panel);
      one.open = detail.items.length <= 2;
      const summary = element("summary", undefined, one);
      element("code", name, summary);
      element("span", ` ${counts}, ${item[3].length} members`, summary).className = "what";
      membersOf(item, one);
    }
  };

  // A chosen box moves out from under the panel.
  const uncover = (id) => {
    const panel = byId("detail");
    if (!id || panel.hidden) return;
    const over = byId(id).getBoundingClientRect().right + 16 - panel.getBoundingClientRect().left;
    if (over > 0) { view.x -= over; draw(); }
  };

  if (svg) {
    let start = null;
    let moved = false;
    svg.addEventListener("pointerdown", (event) => {
      start = { x: event.clientX - view.x, y: event.clientY - view.y, fromX: event.clientX, fromY: event.clientY };
      moved = false;
    });
    svg.addEventListener("pointermove", (event) => {
      if (!start) return;
      if (Math.hypot(event.clientX - start.fromX, event.clientY - start.fromY) > 4 && !moved) {
        moved = true;
        svg.setPointerCapture(event.pointerId);
        svg.classList.add("moving");
      }
      if (!moved) return;
      view.x = event.clientX - start.x;
      view.y = event.clientY - start.y;
      draw();
    });
    const end = () => { start = null; svg.classList.remove("moving"); };
    svg.addEventListener("pointerup", end);
    svg.addEventListener("pointercancel", end);
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const frame = svg.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - frame.left, event.clientY - frame.top);
    }, { passive: false });
    svg.addEventListener("click", (event) => {
      if (moved) { moved = false; return; }
      const box = event.target.closest(".box");
      choose(box ? box.id : "");
      if (box) uncover(box.id);
    });
    svg.addEventListener("keydown", (event) => {
      const box = event.target.closest(".box");
      if (box && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); choose(box.id); uncover(box.id); }
      if (event.key === "Escape") choose("");
    });
    for (const button of all("[data-zoom]")) {
      button.addEventListener("click", () => {
        if (button.dataset.zoom === "fit") fit();
        else zoom(Number(button.dataset.zoom), svg.clientWidth / 2, svg.clientHeight / 2);
      });
    }
    let placed = false;
    new ResizeObserver(() => { if (!placed && svg.clientWidth) { placed = true; fit(); } }).observe(svg);
  }

  // One search for rows and boxes.
  const texts = new Map(all("[data-find]").map((row) => [row, row.dataset.find.toLowerCase()]));
  for (const [id, detail] of Object.entries(data.boxes)) {
    const names = detail.items.flatMap((item) => [item[0], ...(item[3] || []).map((m) => data.tensors[m[0]])]);
    texts.set(byId(id), [detail.title, ...names].join(" ").toLowerCase());
  }
  const search = byId("search");
  const find = () => {
    const wanted = search.value.trim().toLowerCase();
    const hits = new Set();
    for (const [part, text] of texts) {
      const found = !wanted || text.includes(wanted);
      if (found) hits.add(part);
      if (part.classList.contains("box")) {
        part.classList.toggle("hit", Boolean(wanted) && found);
        part.classList.toggle("faded", !found);
      } else {
        part.hidden = !found;
        if (part.querySelector(".unfold")) {
          const inside = wanted && found && !part.querySelector("code").textContent.toLowerCase().includes(wanted);
          unfold(part, Boolean(inside));
          for (const row of all("tr.one", part)) {
            row.hidden = Boolean(inside) && !row.querySelector("code").textContent.toLowerCase().includes(wanted);
          }
        }
      }
    }
    for (const line of lines) {
      line.classList.toggle("faded", Boolean(wanted)
        && !(hits.has(byId(line.dataset.from)) && hits.has(byId(line.dataset.to))));
    }
    byId("found").textContent = wanted ? `${hits.size} found` : "";
  };
  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      const box = document.querySelector(".box.hit");
      if (box) center(box);
    }
    if (event.key === "Escape") { search.value = ""; find(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && event.target !== search) { event.preventDefault(); search.focus(); }
  });
})();
