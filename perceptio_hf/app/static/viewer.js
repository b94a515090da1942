// The two figures of the page: the picture under its masks and points, and the depth map beside it.
// Gradio runs this once, with element, props, trigger, upload and watch; `props.value` is what page.py calls the view.
const $ = (selector) => element.querySelector(selector);
const $$ = (selector) => [...element.querySelectorAll(selector)];
const root = $(".pp"), left = $(".pp-left"), right = $(".pp-right"), base = $(".pp-base"), canvas = $("canvas");
const palette = props.palette.match(/.{6}/g).map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
const hidden = new Set(); // numbers of masks that are switched off
let grey = null, drawn = {}, pointer = null, chosen = 0, edits = 0, latest = null;

const view = () => props.value || {};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

$(".pp-ramp").style.background = `linear-gradient(to right, ${palette.filter((_, i) => i % 15 === 0)
  .map((color) => `rgb(${color})`).join(",")})`;

function fail(text) {
  $(".pp-error").textContent = text || "";
  $(".pp-error").hidden = !text;
}

async function choose(file) {
  if (!file || view().busy) return;
  const turn = ++chosen;
  fail("");
  if (file.size > props.most) {
    fail(`${file.name} has ${Math.round(file.size / 1e6)} MB; at most ${Math.round(props.most / 1e6)} MB are taken.`);
    return;
  }
  $(".pp-busy").hidden = false;
  try {
    const sent = await upload(file);
    if (turn !== chosen) return;
    props.value = latest = { ...view(), chosen: sent.path, name: file.name, edit: ++edits };
    trigger("picture_chosen");
  } catch (error) {
    $(".pp-busy").hidden = true;
    fail(`${file.name} could not be sent: ${error.message || error}`);
  }
}

function setPoints(points) {
  if (!view().picture || view().busy) return;
  props.value = latest = { ...view(), points, edit: ++edits };
  draw();
  trigger("points_set");
}

function addPoint(x, y) {
  const { picture, points = [] } = view();
  if (!picture) return;
  if (points.length >= props.letters.length) return fail(`At most ${props.letters.length} points have letters.`);
  const place = [x * picture.width, y * picture.height].map(Math.floor);
  setPoints([...points, [clamp(place[0], 0, picture.width - 1), clamp(place[1], 0, picture.height - 1)]]);
}

function point(x, y) { // shares of width and height; marks the same place in both figures, and reads depth there
  pointer = x === null ? null : [clamp(x, 0, 0.9999), clamp(y, 0, 0.9999)];
  for (const cross of $$(".pp-cross")) {
    cross.hidden = !pointer || !view().picture;
    if (pointer) cross.style.cssText = `left:${pointer[0] * 100}%;top:${pointer[1] * 100}%`;
  }
  const mark = $(".pp-ramp i"), depth = view().depth;
  const known = pointer && grey && depth && pointer[1] < depth.rows / depth.of;
  mark.hidden = !known;
  if (!known) return void ($(".pp-reading").textContent = "");
  const value = grey.values[Math.floor(pointer[1] * grey.height) * grey.width + Math.floor(pointer[0] * grey.width)] / 255;
  mark.style.left = `${value * 100}%`;
  $(".pp-reading").textContent = `${value.toFixed(2)} here`;
}

function place(event, stage) {
  const box = stage.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function drawDepth(depth) {
  const picture = new Image();
  picture.onload = () => {
    if (view().depth?.url !== depth.url) return;
    const { width, height } = picture;
    Object.assign(canvas, { width, height });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(picture, 0, 0);
    const pixels = pen.getImageData(0, 0, width, height), values = new Uint8Array(width * height);
    const end = Math.round((height * depth.rows) / depth.of) * width;
    for (let i = 0; i < values.length; i++) {
      values[i] = pixels.data[4 * i];
      pixels.data.set(palette[values[i]], 4 * i);
      if (i >= end) pixels.data[4 * i + 3] = 0;
    }
    pen.putImageData(pixels, 0, 0);
    grey = { values, width, height };
    canvas.hidden = false;
    root.dataset.depth = `${depth.rows} of ${depth.of}`; // what the figure shows by now
    if (pointer) point(...pointer);
  };
  picture.src = depth.url;
}

function drawMasks(masks) {
  const layers = $(".pp-layers"), list = $(".pp-masks");
  layers.replaceChildren();
  list.replaceChildren();
  masks.forEach((mask, number) => {
    const layer = document.createElement("img");
    layer.src = mask.url;
    layer.alt = "";
    const tag = document.createElement("b");
    tag.textContent = number + 1;
    tag.style.cssText = `background:${mask.color}` + (mask.at ? `;left:${mask.at[0] * 100}%;top:${mask.at[1] * 100}%` : "");
    layers.append(layer, ...(mask.at && masks.length > 1 ? [tag] : []));
    const show = (on) => [layer, tag].forEach((item) => (item.hidden = !on));
    const item = document.createElement("li"), label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: !hidden.has(number) });
    const swatch = document.createElement("i"), phrase = document.createElement("span");
    const score = document.createElement("em");
    label.className = "pp-switch";
    swatch.style.background = mask.color;
    swatch.textContent = number + 1;
    phrase.textContent = mask.phrase || "mask";
    score.textContent = `expected IoU ${mask.score.toFixed(2)}`;
    score.title = "How well the mask fits, as the model expects it: intersection over union";
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](number);
      show(box.checked);
    });
    show(box.checked);
    label.append(box, swatch, phrase, score);
    item.append(label);
    list.append(item);
  });
}

function draw() { // only what has changed: a view comes with every word
  const { picture, marked, masks = [], depth, veil, points = [], error, busy } = view();
  root.dataset.state = !picture ? "empty" : busy ? "busy" : "ready";
  if (drawn.error !== error) fail(error);
  const shown = marked || picture?.url;
  if (shown && drawn.shown !== shown) base.src = shown;
  base.hidden = !picture;
  $(".pp-drop").hidden = !!picture;
  if (drawn.picture?.url !== picture?.url) hidden.clear();
  for (const stage of [left, right]) {
    stage.style.aspectRatio = picture ? `${picture.width} / ${picture.height}` : "";
    stage.style.maxWidth = picture ? `calc(var(--tall) * ${picture.width / picture.height})` : "";
  }
  $(".pp-size").textContent = picture ? `${picture.width} × ${picture.height}` : "";
  const key = masks.map((mask) => mask.url).join();
  if (drawn.key !== key) {
    hidden.clear();
    drawMasks(masks);
  }
  if (depth?.url !== drawn.depth?.url || depth?.rows !== drawn.depth?.rows) {
    if (depth) drawDepth(depth);
    else [grey, canvas.hidden] = [null, true];
    delete root.dataset.depth;
  }
  $(".pp-empty").hidden = !!depth;
  if (veil && drawn.veil !== veil) $(".pp-veil").src = veil;
  $(".pp-veil-switch").hidden = !veil;
  $(".pp-veil").hidden = !veil || !$(".pp-veil-switch input").checked;
  const idle = picture && !busy;
  $(".pp-undo").disabled = $(".pp-clear").disabled = !idle || !points.length;
  $(".pp-closest").disabled = !idle || points.length < 2;
  $(".pp-tools .pp-choose").disabled = !!busy;
  const left_over = props.letters.length - points.length;
  $(".pp-hint").textContent = !points.length
    ? "Click on the picture to set points A, B, C ..."
    : `${points.length === 1 ? "One point" : `${points.length} points`} set` +
      (left_over ? `; the next is ${props.letters[points.length]}.` : ".");
  $(".pp-hint").hidden = !picture;
  drawn = { shown, picture, key, depth, veil, error };
}

watch("value", () => {
  // On a slow line what was asked for before the last change may come after it. An answer counts all the same where it
  // is one about this picture.
  if (view().edit < edits) {
    const { busy, error, masks, depth, veil, picture } = view();
    if (busy || latest.busy) {
      const same = picture?.path === latest.picture?.path;
      latest = { ...latest, busy, ...(same ? { error, masks, depth, veil } : {}) };
    }
    return void (props.value = latest);
  }
  $(".pp-busy").hidden = true;
  draw();
});

for (const button of $$(".pp-choose")) button.addEventListener("click", () => $(".pp-file").click());
$(".pp-file").addEventListener("change", (event) => {
  choose(event.target.files[0]);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover"])
  left.addEventListener(kind, (event) => {
    event.preventDefault();
    left.classList.add("pp-over");
  });
left.addEventListener("dragleave", () => left.classList.remove("pp-over"));
left.addEventListener("drop", (event) => {
  event.preventDefault();
  left.classList.remove("pp-over");
  choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((item) => item.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    choose(file);
  }
});
for (const stage of [left, right]) {
  stage.addEventListener("pointermove", (event) => point(...place(event, stage)));
  stage.addEventListener("pointerdown", (event) => point(...place(event, stage)));
  stage.addEventListener("pointerleave", () => point(null));
}
left.addEventListener("click", (event) => {
  if (event.target.closest(".pp-drop")) return;
  addPoint(...place(event, left));
  point(null); // the circle would cover the point that was just set
});
left.addEventListener("keydown", (event) => {
  if (event.target !== left || !view().picture) return;
  const step = event.shiftKey ? 0.1 : 0.02;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const [x, y] = pointer || [0.5, 0.5];
  if (moves[event.key]) point(x + moves[event.key][0], y + moves[event.key][1]);
  else if (event.key === "Enter" || event.key === " ") addPoint(x, y);
  else if (event.key === "Delete" || event.key === "Backspace") setPoints((view().points || []).slice(0, -1));
  else return;
  event.preventDefault();
});
$(".pp-undo").addEventListener("click", () => setPoints((view().points || []).slice(0, -1)));
$(".pp-clear").addEventListener("click", () => setPoints([]));
$(".pp-closest").addEventListener("click", () => trigger("closest_asked"));
$(".pp-veil-switch input").addEventListener("change", draw);
draw();
