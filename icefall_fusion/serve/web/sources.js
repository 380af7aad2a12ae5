// Where audio comes from: the microphone, or a file that the browser decodes. All at 16 kHz, one channel.
// Knows: the browser's audio. Must not know: the server, the page's elements.

export const RATE = 16000;
export const PACKET = RATE / 10;
const SILENT = 3 * RATE; // samples of exact zeros that a working microphone does not give

const REASONS = {
  NotAllowedError: "The browser may not use the microphone. Allow it for this page, then start again.",
  NotFoundError: "No microphone was found.",
  NotReadableError: "The microphone cannot be read. Does another program use it?",
};

const after = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

/** Opens the microphone. `take` gets each packet (Float32Array), `warn` a message, `gone` a reason to stop.
 *
 * Returns { stop }, which resolves when the last packet was taken. Throws an Error whose message says why
 * the microphone cannot be used. */
export async function openMicrophone(take, warn, gone) {
  if (!navigator.mediaDevices || !window.AudioWorkletNode) {
    throw new Error("The microphone needs a page by https or from localhost, and a current browser.");
  }
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true };
  let media;
  try {
    media = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(REASONS[error.name] || `The microphone cannot be used: ${error.message}`);
  }
  const context = new AudioContext();
  const close = () => {
    for (const track of media.getTracks()) track.stop();
    if (context.state !== "closed") context.close();
  };
  try {
    await context.audioWorklet.addModule("capture.js");
    await Promise.race([context.resume(), after(5).then(() => {
      if (context.state !== "running") throw new Error("the browser's audio does not start");
    })]); // without any loudspeaker it waits for one
  } catch (error) {
    close();
    throw new Error(`The microphone cannot be used: ${error.message}`);
  }
  const node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  const source = context.createMediaStreamSource(media);
  let ended, zeros = 0;
  const last = new Promise((resolve) => { ended = resolve; });
  node.port.onmessage = ({ data }) => {
    if (data === null) return ended();
    zeros = data.every((sample) => sample === 0) ? zeros + data.length : 0;
    if (zeros >= SILENT && zeros - data.length < SILENT) {
      warn("The microphone gives silence only. Is it muted?");
    }
    take(data);
  };
  media.getAudioTracks()[0].addEventListener("ended", () => gone("The microphone is gone."));
  source.connect(node);
  return {
    async stop() {
      node.port.postMessage("end");
      await Promise.race([last, after(1)]); // a dead device never ends
      close();
    },
  };
}

/** Decodes a file. Returns its samples, Float32Array. Throws an Error whose message says why it cannot. */
export async function decodeFile(file) {
  let buffer;
  try {
    const bytes = await file.arrayBuffer();
    buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);
  } catch {
    throw new Error(`${file.name}: the browser cannot decode this file as audio.`);
  }
  const samples = buffer.getChannelData(0).slice();
  for (let channel = 1; channel < buffer.numberOfChannels; channel++) {
    const other = buffer.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) samples[i] += other[i];
  }
  return samples.map((sample) => sample / buffer.numberOfChannels);
}
