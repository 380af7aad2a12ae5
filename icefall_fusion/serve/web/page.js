// The page: buttons, files, state, latency, errors.
// Knows: elements, sources of audio, a session, the transcript. Must not know: the protocol, how text is laid
// out.
import { decodeFile, openMicrophone, PACKET, RATE } from "./sources.js";
import { Session } from "./session.js";
import { clock, Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const transcript = new Transcript($("transcript"), $("announcer"));
const TOKEN = 4401; // the server's code: it asks for a token

let job = null; // { session, microphone, finishing } while audio is transcribed
let token = "";
let retry = null; // what to do again once a token was given
let lags = [];

function show(id, text) {
  $(id).textContent = text || "";
  $(id).hidden = !text;
}

function setStatus(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

function setButtons() {
  $("microphone").textContent = !job ? "Start microphone" : job.finishing ? "Cancel" : "Stop";
  $("choose").disabled = $("clear").disabled = Boolean(job);
}

function measure({ decoded }) { // how far the text is behind the audio that has left this page
  const lag = Math.max(0, job.session.seconds - decoded);
  lags = [...lags, lag].slice(-200);
  const most = [...lags].sort((a, b) => a - b)[Math.ceil(0.9 * lags.length) - 1];
  $("meter").value = Math.min(lag, $("meter").max);
  $("lag").textContent = `${lag.toFixed(2)} s (9 of 10 below ${most.toFixed(2)} s)`;
}

function begin(what) {
  show("error");
  show("warning");
  lags = [];
  $("lag").textContent = "–";
  $("meter").value = 0;
  const mine = { microphone: null, finishing: false, over: false };
  mine.session = new Session({
    ready: ({ methods }) => {
      const names = [methods || []].flat().join(", ");
      setStatus(names ? `${what} (${names}).` : `${what}.`);
    },
    partial: (message) => {
      measure(message);
      transcript.partial(message);
    },
    segment: (message) => transcript.segment(message),
    warning: ({ message }) => show("warning", message),
    closed: (error, code) => close(mine, error, code),
  });
  job = mine;
  setButtons();
  return mine;
}

function connect(mine) {
  if (mine.over) return;
  if (!mine.finishing) setStatus("Connecting to the server…");
  mine.session.connect(token);
}

function close(mine, error, code) {
  mine.over = true;
  if (mine.microphone) mine.microphone.stop();
  if (job !== mine) return;
  job = null;
  transcript.end();
  const seconds = mine.session.seconds;
  setStatus(error || !seconds ? "Stopped." : `Done: ${clock(seconds)} of audio.`);
  show("error", error);
  if (code === TOKEN) {
    token = "";
    $("access").hidden = false;
    $("token").focus();
  }
  setButtons();
}

async function finish(mine) {
  if (mine.over || mine.finishing) return;
  if (!mine.session.socket) return mine.session.cancel(); // nothing was said yet
  mine.finishing = true;
  setStatus("The last words are decoded…");
  setButtons();
  if (mine.microphone) await mine.microphone.stop();
  mine.session.end();
}

async function startMicrophone() {
  retry = startMicrophone;
  const mine = begin("Listening");
  setStatus("Waiting for the microphone…");
  try {
    const microphone = await openMicrophone(
      (samples) => mine.session.send(samples),
      (message) => show("warning", message),
      (message) => { show("warning", message); finish(mine); },
    );
    mine.microphone = microphone;
    if (mine.over) microphone.stop();
    else connect(mine);
  } catch (error) {
    mine.session.cancel(error.message);
  }
}

async function startFile(file) {
  retry = () => startFile(file);
  const fast = $("fast").checked, mine = begin(file.name);
  setStatus(`${file.name} is read…`);
  let samples;
  try {
    samples = await decodeFile(file);
    if (!samples.length) throw new Error(`${file.name} has no sound.`);
  } catch (error) {
    return mine.session.cancel(error.message);
  }
  connect(mine);
  let start = null;
  for (let at = 0; at < samples.length && !mine.over && !mine.finishing; at += PACKET) {
    while (!mine.over && mine.session.isFull) await wait(10);
    start ??= performance.now();
    const early = at / RATE - (performance.now() - start) / 1000;
    if (!fast && early > 0) await wait(1000 * early);
    if (!mine.finishing) mine.session.send(samples.slice(at, at + PACKET));
  }
  finish(mine);
}

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

function choose(files) {
  if (job) return show("error", "Stop what is transcribed now before you open another file.");
  if (files.length !== 1) return show("error", "Open one file at a time.");
  startFile(files[0]);
}

$("microphone").addEventListener("click", () => {
  if (!job) startMicrophone();
  else if (job.finishing) job.session.cancel();
  else finish(job);
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = ""; // so that the same file can be chosen again
  if (files.length) choose(files);
});
$("clear").addEventListener("click", () => transcript.clear());
$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  if (!token || job) return;
  $("token").value = "";
  $("access").hidden = true;
  if (retry) retry();
});

let depth = 0; // of elements that a dragged file has entered
const carries = (event) => [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragenter", (event) => {
  if (carries(event)) document.body.classList.toggle("over", ++depth > 0);
});
document.addEventListener("dragleave", (event) => {
  if (carries(event)) document.body.classList.toggle("over", --depth > 0);
});
document.addEventListener("dragover", (event) => {
  if (carries(event)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  choose([...event.dataTransfer.files]);
});
setButtons();
