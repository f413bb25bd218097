"use strict";
// One clock for every video on the page: the first video in view leads, the others follow it.
(() => {
  const find = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const videos = find(".tile video");
  const groups = find(".group");
  const inView = new Set();
  const state = { playing: !matchMedia("(prefers-reduced-motion: reduce)").matches, rate: 1, gain: 0, shown: new Set() };

  const copy = document.querySelector(".copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", () => {
      navigator.clipboard.writeText(byId(copy.dataset.copy).textContent)
        .then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Select and copy"; });
    });
  }

  for (const cells of find(".cells")) {
    const rows = JSON.parse(cells.dataset.values);
    const output = cells.parentElement.querySelector("output");
    const rest = output.textContent;
    const columns = Math.max(...rows.map((row) => row.length));
    cells.addEventListener("pointermove", (event) => {
      const box = cells.getBoundingClientRect();
      const layer = Math.min(rows.length - 1, Math.floor((event.clientY - box.top) / box.height * rows.length));
      const step = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
      const value = rows[Math.max(0, layer)][Math.max(0, step)];
      output.textContent = `layer ${layer + 1}, step ${step + 1}: ${value == null ? "not called" : `${(100 * value).toFixed(1)} %`}`;
    });
    cells.addEventListener("pointerleave", () => { output.textContent = rest; });
  }

  const controls = byId("controls");
  if (!controls) return;
  controls.hidden = false;
  const play = byId("play"), scrub = byId("scrub"), frame = byId("frame");
  const frames = Number(scrub.max) + 1;
  const lazy = videos.some((video) => video.dataset.src);

  // A page of many videos would exceed the browser's limit of players, so only what is near the view is loaded.
  const active = () => videos.filter((video) => video.getAttribute("src")
    && !video.closest(".tile").hidden && (!lazy || inView.has(video.closest(".group"))));
  const leader = () => active().find((video) => video.readyState >= 2 && inView.has(video.closest(".group")))
    || active().find((video) => video.readyState >= 2);

  // What is still arriving is let arrive: a request that the page itself breaks off would count as failed.
  function tend() {
    for (const video of lazy ? videos : []) {
      const near = inView.has(video.closest(".group")), loaded = video.hasAttribute("src");
      if (near && !loaded) {
        video.src = video.dataset.src;
      } else if (!near && loaded && video.networkState !== HTMLMediaElement.NETWORK_LOADING) {
        video.removeAttribute("src");
        video.load();
      }
    }
  }
  function start(video) {
    video.playbackRate = state.rate;
    video.play().catch(() => {});  // rejected when paused or unloaded meanwhile
  }
  function show() {
    const current = new Set(active());
    for (const video of videos) {
      if (state.playing && current.has(video)) start(video);
      else video.pause();
    }
    play.textContent = state.playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(state.playing));
    if (!state.playing) seek(Number(scrub.value));
  }
  function seek(index) {
    for (const video of active()) {
      if (video.duration) video.currentTime = Math.min(video.duration, (index + 0.5) / frames * video.duration);
    }
    label(index);
  }
  function label(index) {
    scrub.value = index;
    frame.textContent = `${index + 1} / ${frames}`;
  }
  function follow() {
    const first = leader();
    if (!first || !state.playing) return;
    label(Math.min(frames - 1, frameOf(first)));
    for (const video of active()) {
      if (video === first || !video.duration || video.seeking) continue;
      if (video.paused) { start(video); continue; }
      const half = first.duration / 2;
      let lag = first.currentTime - video.currentTime;
      lag -= lag > half ? first.duration : lag < -half ? -first.duration : 0;
      if (Math.abs(lag) > 0.4) video.currentTime = Math.min(first.currentTime, video.duration);
      else video.playbackRate = state.rate * (1 + Math.max(-0.3, Math.min(0.3, 2 * lag)));
    }
  }

  const frameOf = (video) => Math.floor(video.currentTime / video.duration * frames);

  // |strategy - dense| where both show the same frame, doubled until amplified as asked. Only draws: pages opened as files may not read pixels back.
  function difference() {
    if (!state.gain) return;
    for (const group of inView) {
      const dense = group.querySelector(".tile.baseline video");
      if (!dense || dense.readyState < 2) continue;
      for (const canvas of find("canvas", group)) {
        const video = canvas.previousElementSibling;
        if (video.readyState < 2 || frameOf(video) !== frameOf(dense) || canvas.closest(".tile").hidden) continue;
        const pen = canvas.getContext("2d");
        const draw = (source, mode) => {
          pen.globalCompositeOperation = mode;
          pen.drawImage(source, 0, 0, canvas.width, canvas.height);
        };
        draw(video, "copy");
        draw(dense, "difference");
        for (let gain = 1; gain < state.gain; gain *= 2) draw(canvas, "lighter");
      }
    }
  }
  function tick() {
    difference();
    requestAnimationFrame(tick);
  }

  function filter() {
    state.shown = new Set(find(".chip input:checked").map((box) => box.value));
    for (const tile of find(".tile")) tile.hidden = !state.shown.has(tile.dataset.strategy);
    for (const part of find("tr[data-strategy], .map")) part.classList.toggle("off", !state.shown.has(part.dataset.strategy));
    show();
  }
  function choose(test) {
    for (const box of find(".chip input")) box.checked = test(box);
    filter();
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      inView[isIntersecting ? "add" : "delete"](target);
    }
    tend();
    if (lazy) show();
  }, { rootMargin: lazy ? "50%" : "0px" });

  for (const video of videos) {
    video.controls = false;
    video.muted = true;
    video.addEventListener("loadeddata", () => { if (!state.playing) seek(Number(scrub.value)); });
  }
  play.addEventListener("click", () => { state.playing = !state.playing; show(); });
  scrub.addEventListener("input", () => { state.playing = false; show(); });
  byId("speed").addEventListener("change", (event) => { state.rate = Number(event.target.value); show(); });
  byId("view")?.addEventListener("change", (event) => {
    state.gain = Number(event.target.value);
    for (const canvas of find(".tile canvas")) canvas.hidden = !state.gain;
  });
  byId("jump")?.addEventListener("change", (event) => {
    byId(event.target.value)?.scrollIntoView({ behavior: "instant" });
    event.target.value = "";
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("change", (event) => { if (event.target.name === "strategy") filter(); });
  const baseline = find(".tile.baseline").map((tile) => tile.dataset.strategy);
  byId("all").addEventListener("click", () => choose(() => true));
  byId("none")?.addEventListener("click", () => choose((box) => baseline.includes(box.value)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || event.target.closest("button, input, select, summary, a, [tabindex]")) return;
    event.preventDefault();
    play.click();
  });

  controls.reset();
  for (const group of groups) watcher.observe(group);
  filter();
  setInterval(follow, 100);
  setInterval(tend, 500);
  requestAnimationFrame(tick);
})();
