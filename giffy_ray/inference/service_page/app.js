// The page of the service: sends two images, plays the frames that come back, and compares them with a cross-fade.

const MAX_BITMAP_BYTES = 500e6; // decoded frames of all clips; larger ones are decoded smaller
const MAX_DURATION_MS = 400; // of a step of the playback clock; a hidden tab does not catch up
const PLAY_ICON = "M6 4l10 6-10 6z";
const PAUSE_ICON = "M5 4h4v12H5zM11 4h4v12h-4z";
const EASES = {
  linear: (time) => time,
  in: (time) => time ** 2,
  out: (time) => 1 - (1 - time) ** 2,
  "in-out": (time) => time ** 2 * (3 - 2 * time),
};
const TOKEN_KEY = "giffy_ray.token";

const byId = (id) => document.getElementById(id);
const files = { start: null, end: null };
const prefersStill = matchMedia("(prefers-reduced-motion: reduce)");

let info = null; // of the service: model, limits, whether it needs a token
let request = null; // AbortController of the request that runs
let result = null; // what the player shows

/* ------------------------------------------------------------------ the service */

async function loadInfo() {
  info = await (await fetch("info")).json();
  byId("model").textContent = `Model ${info.model}`;
  byId("frames").max = Math.min(info.limits.frames, 120);
  byId("samples").max = info.limits.samples;
  byId("token").value = sessionStorage.getItem(TOKEN_KEY) ?? "";
  byId("token_field").hidden = !info.needs_token;
  updateFields();
}

async function post(images, options, signal) {
  const body = new FormData();
  for (const name of ["start", "end"]) body.append(name, images[name], "image");
  for (const [name, value] of Object.entries(options)) body.append(name, value);
  const token = byId("token").value.trim();
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const response = await fetch("interpolate", { method: "POST", body, headers, signal });
  if (response.ok) {
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    return response;
  }
  if (response.status === 401) {
    byId("token_field").hidden = false;
    byId("token").focus();
  }
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error ?? `The service answers with status ${response.status}.`);
}

// Yields the parts of a multipart response as they arrive: {name, blob}. Each part states its length.
async function* readParts(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = new Uint8Array();
  const readMore = async () => {
    const { done, value } = await reader.read();
    if (done) throw new Error("The service ended the answer early.");
    const joined = new Uint8Array(buffer.length + value.length);
    joined.set(buffer);
    joined.set(value, buffer.length);
    buffer = joined;
  };
  for (;;) {
    let end = -1;
    for (;;) {
      const head = decoder.decode(buffer.subarray(0, 1000));
      if (/^--\w+--/.test(head)) return;
      end = head.indexOf("\r\n\r\n");
      if (end >= 0) break;
      await readMore();
    }
    const header = decoder.decode(buffer.subarray(0, end));
    const length = Number(/content-length: (\d+)/i.exec(header)[1]);
    const begin = end + 4;
    while (buffer.length < begin + length + 2) await readMore();
    yield {
      name: /filename="([^"]+)"/.exec(header)[1],
      blob: new Blob([buffer.slice(begin, begin + length)], { type: /content-type: (\S+)/i.exec(header)[1] }),
    };
    buffer = buffer.slice(begin + length + 2);
  }
}

/* ------------------------------------------------------------------ images */

function setImage(name, file) {
  files[name] = file;
  const slot = byId(name).parentElement;
  const thumbnail = slot.querySelector("img");
  URL.revokeObjectURL(thumbnail.src);
  slot.classList.toggle("filled", Boolean(file));
  slot.title = file?.name ?? "";
  thumbnail.hidden = !file;
  slot.querySelector(".hint").textContent = file ? file.name : "Choose or drop an image";
  if (file) {
    thumbnail.src = URL.createObjectURL(file);
    thumbnail.onload = () => {
      slot.querySelector(".hint").textContent = `${thumbnail.naturalWidth} × ${thumbnail.naturalHeight}`;
    };
    thumbnail.onerror = () => (thumbnail.hidden = true); // a format that this browser does not show
  } else {
    thumbnail.removeAttribute("src");
  }
  updateFields();
}

// Takes what was chosen or dropped: two images fill both places.
function takeFiles(name, list) {
  const images = [...list].filter((file) => file.type.startsWith("image/") || !file.type);
  if (!images.length) {
    if (list.length) showError("That is not an image.");
    return;
  }
  showError("");
  if (images.length > 1) {
    setImage("start", images[0]);
    setImage("end", images[1]);
  } else {
    setImage(name, images[0]);
  }
}

function connectSlot(name) {
  const input = byId(name);
  const slot = input.parentElement;
  input.multiple = true;
  input.addEventListener("change", () => {
    takeFiles(name, input.files);
    input.value = ""; // so that the same file can be chosen again
  });
  slot.addEventListener("dragover", (event) => {
    event.preventDefault();
    slot.classList.add("over");
  });
  slot.addEventListener("dragleave", () => slot.classList.remove("over"));
  slot.addEventListener("drop", (event) => {
    event.preventDefault();
    slot.classList.remove("over");
    takeFiles(name, event.dataTransfer.files);
  });
}

/* ------------------------------------------------------------------ form */

function readOptions() {
  const options = {
    frames: byId("frames").value,
    fps: byId("fps").value,
    samples: byId("samples").value,
    ease: byId("ease").value,
    fit: byId("fit").value,
    seed: byId("seed").value || "0",
    loop: byId("loop").checked,
  };
  if (byId("size").value) options.size = byId("size").value;
  return options;
}

const countFrames = (options) => (options.loop ? 2 * options.frames - 2 : Number(options.frames));

function updateFields() {
  const options = readOptions();
  const seconds = countFrames(options) / options.fps;
  byId("frames_value").textContent = `${options.frames} (${seconds.toFixed(1)} s)`;
  byId("fps_value").textContent = options.fps;
  byId("samples_value").textContent = options.samples;
  byId("generate").disabled = !(files.start && files.end) || Boolean(request);
  byId("swap").disabled = !(files.start || files.end);
}

function showError(message) {
  byId("error").hidden = !message;
  byId("error").textContent = message;
}

function showProgress(fraction, text) {
  byId("progress").hidden = fraction === null;
  if (fraction !== null) byId("progress").value = fraction;
  if (byId("status").textContent !== text) byId("status").textContent = text;
}

function setRunning(controller) {
  request = controller;
  const hadFocus = document.activeElement === byId(controller ? "generate" : "cancel");
  byId("cancel").hidden = !controller;
  updateFields();
  if (hadFocus) byId(controller ? "cancel" : "generate").focus({ preventScroll: true });
}

async function generate() {
  const options = readOptions();
  const images = { ...files };
  const uploadMb = (images.start.size + images.end.size) / 2 ** 20;
  showError("");
  if (info && uploadMb > info.limits.upload_mb) {
    showError(`The images have ${uploadMb.toFixed(0)} MB together; the limit is ${info.limits.upload_mb} MB.`);
    return;
  }
  const controller = new AbortController();
  setRunning(controller);
  showProgress(0, "Waiting for the service");
  try {
    const response = await post(images, { ...options, preview: true }, controller.signal);
    await receiveClips(response, images, options);
    showProgress(null, "Done.");
    if (!prefersStill.matches) setPlaying(true);
    if (document.activeElement === byId("cancel")) byId("play").focus({ preventScroll: true });
  } catch (error) {
    showProgress(null, "");
    if (error.name === "AbortError") showProgress(null, "Cancelled.");
    else showError(error instanceof TypeError ? "The service does not answer." : error.message);
  } finally {
    setRunning(null);
  }
}

async function receiveClips(response, images, options) {
  const count = countFrames(options);
  const total = count * options.samples;
  const clips = [];
  let received = 0;
  for await (const { name, blob } of readParts(response)) {
    if (name === "error") throw new Error(JSON.parse(await blob.text()).error);
    const sample = Number(/^sample-(\d+)/.exec(name)[1]);
    const clip = (clips[sample - 1] ??= { sample, frames: [], video: null });
    if (!name.includes("/")) {
      clip.video = blob;
      addDownloads(clip);
      continue;
    }
    clip.frames.push(await decodeFrame(blob, total));
    received += 1;
    if (received === 1) openPlayer({ clips, count, images, options, frame: 0 });
    if (clip.frames.length === 1) addFigure(clip);
    if (received === 1) revealResults();
    showProgress(received / total, describeProgress(received, total, options.samples, sample));
    showFrame(clip.frames.length - 1);
  }
  showFrame(0);
}

// Changes at every quarter only, because screen readers speak it.
function describeProgress(received, total, samples, sample) {
  const quarter = Math.floor((4 * received) / total) * 25;
  return samples > 1 ? `Generating sample ${sample} of ${samples}, ${quarter} %` : `Generating, ${quarter} %`;
}

async function decodeFrame(blob, total) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.sqrt(MAX_BITMAP_BYTES / (4 * bitmap.width * bitmap.height * total));
  if (scale >= 1) return bitmap;
  const resizeWidth = Math.max(2, Math.round(bitmap.width * scale));
  const resizeHeight = Math.max(2, Math.round(bitmap.height * scale));
  const scaled = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high" });
  bitmap.close();
  return scaled;
}

/* ------------------------------------------------------------------ player */

function openPlayer(opened) {
  setPlaying(false);
  for (const clip of result?.clips ?? []) {
    for (const frame of clip.frames) frame.close();
    URL.revokeObjectURL(clip.url);
  }
  result = opened;
  byId("clips").replaceChildren();
  byId("scrub").max = opened.count - 1;
  byId("empty").hidden = true;
  byId("player").hidden = false;
}

// On a phone, the clips are below the form.
function revealResults() {
  if (byId("results").getBoundingClientRect().top < innerHeight / 2) return;
  byId("results").scrollIntoView({ behavior: prefersStill.matches ? "auto" : "smooth" });
}

function addFigure(clip) {
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.width = clip.frames[0].width;
  canvas.height = clip.frames[0].height;
  canvas.setAttribute("role", "img");
  const caption = document.createElement("figcaption");
  const title = document.createElement("span");
  title.textContent = clip.sample === 1 ? "Most probable" : `Sample ${clip.sample}`;
  canvas.setAttribute("aria-label", `${title.textContent}: the generated clip`);
  caption.append(title);
  figure.append(canvas, caption);
  byId("clips").append(figure);
  Object.assign(clip, { canvas, caption, title: title.textContent });
}

function addDownloads(clip) {
  clip.url = URL.createObjectURL(clip.video);
  const link = document.createElement("a");
  link.className = "button small";
  link.href = clip.url;
  link.download = fileName(clip, "mp4");
  link.textContent = "mp4";
  link.setAttribute("aria-label", `Download ${clip.title} as mp4`);
  const button = document.createElement("button");
  button.type = "button";
  button.className = "small";
  button.textContent = "GIF";
  button.setAttribute("aria-label", `Download ${clip.title} as GIF`);
  const { images, options } = result;
  button.addEventListener("click", () => downloadGif(clip, images, options, button));
  clip.caption.append(link, button);
}

const fileName = (clip, suffix) => `giffy-sample-${clip.sample}.${suffix}`;

// The service makes the clip again, from the same images and seed.
async function downloadGif(clip, images, options, button) {
  button.disabled = true;
  showError("");
  showProgress(null, `Making the GIF of ${clip.title}`);
  try {
    const response = await post(images, { ...options, samples: 1, first_sample: clip.sample, format: "gif" });
    const url = URL.createObjectURL(await response.blob());
    const link = document.createElement("a");
    link.href = url;
    link.download = fileName(clip, "gif");
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    showProgress(null, "The GIF is ready.");
  } catch (error) {
    showProgress(null, "");
    showError(error.message);
  } finally {
    button.disabled = false;
  }
}

function showFrame(frame) {
  result.frame = Math.max(0, Math.min(frame, result.count - 1));
  const fps = Number(result.options.fps);
  byId("scrub").value = result.frame;
  byId("time").textContent = `${result.frame + 1} of ${result.count}, ${(result.frame / fps).toFixed(1)} s`;
  byId("scrub").setAttribute("aria-valuetext", `frame ${byId("time").textContent}`);
  for (const clip of result.clips) if (clip?.canvas) drawClip(clip);
}

function drawClip(clip) {
  const { canvas, frames } = clip;
  const context = canvas.getContext("2d");
  const fraction = byId("compare").value / 100;
  const edge = Math.round(canvas.width * (1 - fraction));
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(frames[Math.min(result.frame, frames.length - 1)], 0, 0);
  if (!fraction) return;
  context.save();
  context.beginPath();
  context.rect(edge, 0, canvas.width - edge, canvas.height);
  context.clip();
  drawCrossFade(context, clip);
  context.restore();
  context.fillStyle = "#fff";
  context.fillRect(edge - 1, 0, 2, canvas.height);
}

// The start is frame 0 and the end is frame `last`; after it, a loop returns.
function drawCrossFade(context, clip) {
  const last = Number(result.options.frames) - 1;
  const ease = EASES[result.options.ease];
  const isReturn = result.frame > last;
  const time = isReturn ? 1 - ease((result.frame - last) / last) : ease(result.frame / last);
  context.clearRect(0, 0, context.canvas.width, context.canvas.height);
  context.drawImage(clip.frames[0], 0, 0);
  context.globalAlpha = time;
  if (clip.frames.length > last) context.drawImage(clip.frames[last], 0, 0);
  context.globalAlpha = 1;
}

const clock = { playing: false, last_ms: 0, elapsed_ms: 0 };

function setPlaying(playing) {
  const starts = playing && !clock.playing;
  clock.playing = playing && Boolean(result);
  byId("play_icon").setAttribute("d", clock.playing ? PAUSE_ICON : PLAY_ICON);
  byId("play_text").textContent = clock.playing ? "Pause" : "Play";
  if (starts && clock.playing) {
    clock.last_ms = performance.now();
    clock.elapsed_ms = 0;
    requestAnimationFrame(tick);
  }
}

function tick(now_ms) {
  if (!clock.playing) return;
  clock.elapsed_ms += Math.min(now_ms - clock.last_ms, MAX_DURATION_MS);
  clock.last_ms = now_ms;
  const frame_ms = 1000 / result.options.fps;
  const steps = Math.floor(clock.elapsed_ms / frame_ms);
  if (steps) {
    clock.elapsed_ms -= steps * frame_ms;
    showFrame((result.frame + steps) % result.count);
  }
  requestAnimationFrame(tick);
}

function scrubTo(frame) {
  setPlaying(false);
  showFrame(frame);
}

function handleKey(event) {
  if (!result || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const isRange = target.type === "range";
  if (event.key === " " && (isRange || target === document.body)) {
    setPlaying(!clock.playing);
  } else if (target.matches("input, select, textarea, summary")) {
    return;
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    scrubTo(result.frame + (event.key === "ArrowRight" ? 1 : -1));
  } else if (event.key === "Home" || event.key === "End") {
    scrubTo(event.key === "Home" ? 0 : result.count - 1);
  } else {
    return;
  }
  event.preventDefault();
}

/* ------------------------------------------------------------------ start */

for (const name of ["start", "end"]) connectSlot(name);
for (const type of ["dragover", "drop"]) document.addEventListener(type, (event) => event.preventDefault());
byId("swap").addEventListener("click", () => {
  const { start, end } = files;
  setImage("start", end);
  setImage("end", start);
});
byId("form").addEventListener("input", updateFields);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("generate").disabled) generate();
});
byId("cancel").addEventListener("click", () => request?.abort());
byId("play").addEventListener("click", () => setPlaying(!clock.playing));
byId("scrub").addEventListener("input", (event) => scrubTo(Number(event.target.value)));
byId("compare").addEventListener("input", () => {
  byId("compare_value").textContent = `${byId("compare").value} %`;
  showFrame(result.frame);
});
document.addEventListener("keydown", handleKey);
byId("compare_value").textContent = "0 %";
setPlaying(false);
updateFields();
loadInfo().catch(() => showError("The service does not answer."));
