// The songs of a desk that a program serves: adding them, watching them, opening them.

(() => {
  const $ = id => document.getElementById(id), root = new URL("/", location.href), here = document.body.dataset.song;
  const stems = /^(drums|bass|other|vocals|guitar|piano|mixture|no_\w+)$/i, seen = {};
  let songs = [];

  function say(text) { if ($("news").textContent !== text) $("news").textContent = text; }

  function make(tag, settings, ...children) {
    const node = Object.assign(document.createElement(tag), settings);
    node.append(...children);
    return node;
  }

  function underWay(song) { return song.state === "waiting" || song.state === "working"; }

  function said(song) {
    if (song.state === "waiting") return "waiting";
    if (song.state === "failed") return song.error;
    if (song.state === "ready") return song.about;
    return song.total ? `${song.stage}: ${Math.round(100 * song.done / song.total)} %` : song.stage;
  }

  // A row is made once and filled anew, so that the focus stays where it is.
  function rowOf(song) {
    const what = make("span", { className: "what" }), bar = make("progress", { max: 1 });
    const open = make("a", { href: new URL("song/" + song.id, root).href, textContent: "Open" });
    const remove = make("button", { type: "button" });
    open.setAttribute("aria-label", "Open " + song.name);
    bar.setAttribute("aria-label", "Progress of " + song.name);
    remove.onclick = () => send("remove?" + new URLSearchParams({ id: song.id })).then(gone => {
      if (!gone) return;
      if (String(song.id) === here) location.href = root.href;
      else { say(`${remove.textContent === "Cancel" ? "cancelled" : "removed"} ${song.name}`); $("file").focus(); }
    });
    const text = make("div", {}, make("b", { textContent: song.name }), " ", what);
    const node = make("li", {}, text, make("div", { className: "does" }, open, remove), bar);
    node.dataset.id = song.id;
    return node;
  }

  function show() {
    const list = $("queue"), rows = Object.fromEntries([...list.children].map(node => [node.dataset.id, node]));
    for (const [id, node] of Object.entries(rows)) if (!songs.some(song => String(song.id) === id)) node.remove();
    for (const song of songs) {
      const node = rows[song.id] || list.appendChild(rowOf(song)), now = String(song.id) === here;
      node.querySelector(".what").textContent = (now ? "on this page; " : "") + said(song);
      node.querySelector(".what").classList.toggle("failed", song.state === "failed");
      node.querySelector("a").hidden = song.state !== "ready" || now;
      const word = underWay(song) ? "Cancel" : "Remove", remove = node.querySelector("button");
      remove.textContent = word;
      remove.setAttribute("aria-label", `${word} ${song.name}`);
      const bar = node.querySelector("progress");
      bar.hidden = song.state !== "working";
      bar.value = song.total ? song.done / song.total : 0;
    }
    const left = songs.filter(underWay).length;
    $("count").textContent = songs.length ? `(${songs.length}${left ? `, ${left} under way` : ""})` : "";
  }

  function announce() {
    for (const song of songs) {
      const before = seen[song.id];
      seen[song.id] = song.state;
      if (!before || before === song.state) continue;
      if (song.state === "ready") say(`${song.name} is ready`);
      if (song.state === "failed") say(song.error);
    }
  }

  async function watch() {
    try { songs = (await (await fetch(new URL("songs", root))).json()).songs; } catch {
      return say("the program that made this page has ended: start it again to add songs");
    }
    show();
    announce();
    const first = songs.find(song => song.state === "ready");
    if (!here && first && !songs.some(song => song.opened)) { location.href = new URL("song/" + first.id, root).href; return; }
    setTimeout(watch, songs.some(underWay) ? 400 : 2000);
  }

  async function send(path, body) {
    try {
      const answer = await fetch(new URL(path, root), { method: "POST", body, headers: { "X-Desk": "1" } });
      if (answer.ok) return true;
      say(await answer.text());
    } catch { say("the program that made this page does not answer"); }
    return false;
  }

  async function add(name, body) {
    say("reading " + name);
    const model = document.querySelector("#models input:checked").value;
    if (!await send("songs?" + new URLSearchParams({ name, model }), body)) return;
    say("added " + name);
    $("songs-box").open = true;
  }

  async function files(entry) {
    if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
    const reader = entry.createReader(), found = [];
    for (let some; (some = await new Promise((done, failed) => reader.readEntries(done, failed))).length;) found.push(...some);
    return (await Promise.all(found.filter(x => x.isFile).map(files))).flat();
  }

  // A folder of stems travels as one archive; any other folder is its songs.
  async function addFolder(name, found) {
    const parts = found.filter(file => stems.test(file.name.replace(/\.[^.]*$/, "")));
    if (parts.length < 2) { for (const file of found) await add(file.name, file); return; }
    const read = async file => ({ name: file.name, bytes: new Uint8Array(await file.arrayBuffer()) });
    await add(name + ".zip", new Blob(zip(await Promise.all(parts.map(read)))));
  }

  document.addEventListener("dragover", e => {
    if (![...e.dataTransfer.types].includes("Files")) return;
    e.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", e => { if (!e.relatedTarget) document.body.classList.remove("dropping"); });
  document.addEventListener("drop", async e => {
    e.preventDefault();
    document.body.classList.remove("dropping");
    const entries = [...e.dataTransfer.items].map(item => item.webkitGetAsEntry && item.webkitGetAsEntry());
    const plain = [...e.dataTransfer.files];
    for (const [i, file] of plain.entries()) {
      if (entries[i] && entries[i].isDirectory) await addFolder(entries[i].name, await files(entries[i]));
      else await add(file.name, file);
    }
  });
  document.addEventListener("keydown", e => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.type === "number") return;
    const ready = songs.filter(song => song.state === "ready").map(song => String(song.id));
    const turn = { KeyN: 1, KeyP: -1 }[e.code], at = ready.indexOf(here);
    if (turn && ready.length > 1) location.href = new URL("song/" + ready[(at + turn + ready.length) % ready.length], root).href;
    if (e.code === "KeyO") { $("songs-box").open = true; $("file").click(); }
  });
  $("file").onchange = async e => {
    const chosen = [...e.target.files];
    for (const file of chosen) await add(file.name, file);
    e.target.value = "";
  };
  $("folder").onchange = async e => {
    const chosen = [...e.target.files];
    if (chosen.length) await addFolder(chosen[0].webkitRelativePath.split("/")[0] || "stems", chosen);
    e.target.value = "";
  };
  $("form").onsubmit = e => e.preventDefault();
  watch();
})();
