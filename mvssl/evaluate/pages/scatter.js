"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const map = byId("map"), pen = map.getContext("2d"), tip = byId("tip"), sprite = byId("sprite");
  const count = data.names.length, unit = 10000;
  const hidden = new Set(), view = { x: 0.5, y: 0.5, zoom: 1 };
  let shown = 0, chosen = -1, pictures = false, waiting = false, pinned = false;

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const named = ["#2f6fdb", "#e0752d", "#2c9c55", "#cf3a4e", "#8a5bd0", "#8f6a4a", "#d764b5", "#6f7886", "#a8a32a", "#27a9bd"];
  const colour = (label) => {
    if (label < 0) return data.classes.length ? "#8a93a0" : named[0];
    if (data.classes.length <= named.length) return named[label];
    return `hsl(${(label * 137.508) % 360} ${60 + 15 * (label % 2)}% ${[46, 60, 38][label % 3] + (dark.matches ? 10 : 0)}%)`;
  };
  const colours = data.labels.map(colour);

  const at = (n) => data.projections[shown].points[n];
  const spans = data.projections.map(({ points }) => [0, 1].map((axis) => {  // of each axis, at most 1
    let low = Infinity, high = -Infinity;
    for (const point of points) [low, high] = [Math.min(low, point[axis]), Math.max(high, point[axis])];
    return Math.max(0.02, (high - low) / unit);
  }));
  const edge = () => Math.min(map.clientWidth / spans[shown][0], map.clientHeight / spans[shown][1]) * 0.9 * view.zoom;
  const toScreen = (n) => {
    const [x, y] = at(n), side = edge();
    return [map.clientWidth / 2 + (x / unit - view.x) * side, map.clientHeight / 2 + (y / unit - view.y) * side];
  };
  const visible = (n) => !hidden.has(data.labels[n]);

  function picture(context, n, x, y, size) {
    const tile = data.tile;
    context.drawImage(sprite, (n % data.columns) * tile, Math.floor(n / data.columns) * tile, tile, tile, x, y, size, size);
  }

  function draw() {
    waiting = false;
    const ratio = window.devicePixelRatio || 1, width = map.clientWidth, height = map.clientHeight;
    if (map.width !== Math.round(width * ratio) || map.height !== Math.round(height * ratio)) {
      map.width = Math.round(width * ratio);
      map.height = Math.round(height * ratio);
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const crowd = Math.sqrt(count) / Math.sqrt(view.zoom);
    const radius = Math.max(2, Math.min(6, 130 / crowd)), size = Math.max(14, Math.min(96, (1100 / Math.sqrt(count)) * Math.sqrt(view.zoom)));
    pen.globalAlpha = pictures ? 1 : count > 1500 ? 0.75 : 0.9;
    for (let n = 0; n < count; n++) {
      if (!visible(n)) continue;
      const [x, y] = toScreen(n);
      if (x < -size || y < -size || x > width + size || y > height + size) continue;
      if (pictures) {
        pen.fillStyle = data.classes.length ? colours[n] : "#8a93a088";
        const rim = data.classes.length ? 2 : 1;
        pen.fillRect(x - size / 2 - rim, y - size / 2 - rim, size + 2 * rim, size + 2 * rim);
        picture(pen, n, x - size / 2, y - size / 2, size);
      } else {
        pen.fillStyle = colours[n];
        pen.beginPath();
        pen.arc(x, y, radius, 0, 7);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    if (chosen >= 0) {
      const [x, y] = toScreen(chosen);
      pen.strokeStyle = getComputedStyle(document.body).color;
      pen.lineWidth = 2.5;
      pen.beginPath();
      if (pictures) pen.rect(x - size / 2 - 3, y - size / 2 - 3, size + 6, size + 6);
      else pen.arc(x, y, radius + 4, 0, 7);
      pen.stroke();
    }
    place();
  }

  function redraw() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }

  function place() {
    tip.hidden = chosen < 0;
    if (chosen < 0) return;
    const [x, y] = toScreen(chosen), width = tip.offsetWidth, height = tip.offsetHeight;
    const left = x + 18 + width < map.clientWidth ? x + 18 : x - 18 - width;
    const top = Math.min(Math.max(6, y - height / 2), Math.max(6, map.clientHeight - height - 6));
    tip.style.transform = `translate(${Math.max(6, left)}px, ${top}px)`;
  }

  function choose(n, aloud) {
    if (n === chosen) return;
    chosen = n;
    if (n >= 0) {
      const name = data.labels[n] < 0 ? "" : data.classes[data.labels[n]];
      const small = byId("picture"), context = small.getContext("2d");
      context.clearRect(0, 0, small.width, small.height);
      picture(context, n, 0, 0, small.width);
      tip.querySelector("b").textContent = name;
      tip.querySelector("b").style.color = name ? colours[n] : "";
      tip.querySelector("span").textContent = data.names[n];
      if (aloud) byId("say").textContent = [name, data.names[n]].filter(Boolean).join(": ");
    }
    redraw();
  }

  function nearest(x, y, reach) {
    let best = -1, least = reach * reach;
    for (let n = 0; n < count; n++) {
      if (!visible(n)) continue;
      const [px, py] = toScreen(n), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance <= least) [best, least] = [n, distance];
    }
    return best;
  }

  function zoom(factor, x, y) {
    const before = edge(), zoomed = Math.min(200, Math.max(0.5, view.zoom * factor));
    const dx = x - map.clientWidth / 2, dy = y - map.clientHeight / 2;
    view.zoom = zoomed;
    view.x += dx / before - dx / edge();
    view.y += dy / before - dy / edge();
    redraw();
  }

  function step(dx, dy) {
    if (chosen < 0) return choose(nearest(map.clientWidth / 2, map.clientHeight / 2, Infinity), true);
    const [x, y] = toScreen(chosen);
    let best = -1, least = Infinity;
    for (let n = 0; n < count; n++) {
      if (n === chosen || !visible(n)) continue;
      const [px, py] = toScreen(n), along = (px - x) * dx + (py - y) * dy, across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      if (along <= 0 || across > along) continue;
      const cost = along + 2 * across;
      if (cost < least) [best, least] = [n, cost];
    }
    if (best < 0) return;
    choose(best, true);
    const [px, py] = toScreen(best);
    if (px < 20 || py < 20 || px > map.clientWidth - 20 || py > map.clientHeight - 20) [view.x, view.y] = [at(best)[0] / unit, at(best)[1] / unit];
  }

  const fingers = new Map();
  let moved = 0;
  const place_of = (event) => {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, place_of(event));
    moved = 0;
  });
  map.addEventListener("pointermove", (event) => {
    const [x, y] = place_of(event), before = fingers.get(event.pointerId);
    if (!before) {
      if (event.pointerType === "mouse" && !pinned) choose(nearest(x, y, 22), false);
      return;
    }
    if (fingers.size === 1) {
      moved += Math.hypot(x - before[0], y - before[1]);
      view.x -= (x - before[0]) / edge();
      view.y -= (y - before[1]) / edge();
      redraw();
    } else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      moved = 99;
      zoom(Math.hypot(x - other[0], y - other[1]) / Math.max(1, Math.hypot(before[0] - other[0], before[1] - other[1])), (x + other[0]) / 2, (y + other[1]) / 2);
    }
    fingers.set(event.pointerId, [x, y]);
  });
  map.addEventListener("pointerup", (event) => {
    const [x, y] = place_of(event);
    if (fingers.size === 1 && moved < 6) {
      const found = nearest(x, y, event.pointerType === "mouse" ? 22 : 40);
      pinned = found >= 0;
      choose(found, true);
    }
    fingers.delete(event.pointerId);
  });
  map.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  map.addEventListener("pointerleave", () => { if (!fingers.size && !pinned) choose(-1, false); });
  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...place_of(event));
  }, { passive: false });
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const middle = [map.clientWidth / 2, map.clientHeight / 2], focus = chosen < 0 ? middle : toScreen(chosen);
    const keys = {
      ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
      "+": () => zoom(1.3, ...focus), "=": () => zoom(1.3, ...focus), "-": () => zoom(1 / 1.3, ...focus),
      "0": () => { Object.assign(view, { x: 0.5, y: 0.5, zoom: 1 }); redraw(); },
      i: () => toggle.click(), Escape: () => { pinned = false; choose(-1, false); },
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    pinned = event.key.startsWith("Arrow") || pinned && event.key !== "Escape";
    keys[event.key]();
  });

  function button(parent, text, pressed, click) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    if (pressed !== null) made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", click);
    parent.append(made);
    return made;
  }
  const bar = byId("bar");
  const tabs = data.projections.map((projection, n) => button(bar, projection.name, n === 0, () => {
    shown = n;
    tabs.forEach((tab, other) => tab.setAttribute("aria-pressed", other === n));
    byId("about").textContent = data.projections[n].about;
    Object.assign(view, { x: 0.5, y: 0.5, zoom: 1 });
    redraw();
  }));
  byId("about").textContent = data.projections[0].about;
  const toggle = button(bar, "Show pictures", false, () => {
    pictures = !pictures;
    toggle.setAttribute("aria-pressed", pictures);
    redraw();
  });
  button(bar, "Everything", null, () => { Object.assign(view, { x: 0.5, y: 0.5, zoom: 1 }); redraw(); });

  const legend = byId("legend");
  if (legend) {
    const each = new Map();
    data.labels.forEach((label) => each.set(label, (each.get(label) || 0) + 1));
    const entries = [...each.keys()].sort((a, b) => (a < 0) - (b < 0) || a - b);
    const marks = () => {
      items.forEach(([label, item]) => item.setAttribute("aria-pressed", !hidden.has(label)));
      if (chosen >= 0 && !visible(chosen)) choose(-1, false);
      redraw();
    };
    if (entries.length > 1) {
      button(legend, "all", null, () => { hidden.clear(); marks(); });
      button(legend, "none", null, () => { entries.forEach((label) => hidden.add(label)); marks(); });
    }
    const items = entries.map((label) => {
      const item = button(legend, "", true, () => {
        if (!hidden.delete(label)) hidden.add(label);
        marks();
      });
      const dot = document.createElement("i"), text = document.createElement("span");
      dot.style.background = colour(label);
      text.textContent = `${label < 0 ? "no label" : data.classes[label]} (${each.get(label)})`;
      item.title = text.textContent;
      item.append(dot, text);
      return [label, item];
    });
  }
  new ResizeObserver(redraw).observe(map);
  dark.addEventListener("change", redraw);
  if (sprite.decode) sprite.decode().then(redraw, redraw);
  if (location.hash === "#pictures") toggle.click();
  redraw();
})();
