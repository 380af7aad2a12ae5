// One stream at the server: the protocol of /v1/stream.
// Knows: the WebSocket and its messages. Must not know: where audio comes from, how text is shown.
import { RATE } from "./sources.js";

const HELD = 1 << 18; // bytes that a file's sender lets wait in the browser
const LATE = 60; // seconds of live audio that may wait in the browser

const LOST = "The connection to the server was lost. The text so far is kept.";
const UNREACHED = "The server cannot be reached.";
const CLOSES = {
  1008: "The server refused the stream.",
  1009: "The server refused a message because of its size.",
  1012: "The server restarts. The text so far is kept.",
  1013: "The server is full: all its streams are taken. Try again in a moment.",
  4401: "The server asks for a token.",
};

/** A stream, once `connect` was called. `on` has the functions ready, partial, segment, warning (each gets the
 * message) and closed(error, code): error is null after the last result; it is called once. */
export class Session {
  constructor(on) {
    this.on = on;
    this.sent = 0; // samples
    this.waiting = []; // packets from before the server was ready
    this.isOpen = this.isReady = this.isFinal = this.isEnded = this.isClosed = false;
    this.error = this.socket = null;
  }

  /** Opens the stream; the token may be empty. */
  connect(token) {
    const url = new URL("v1/stream", location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.search = url.hash = "";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.isOpen = true;
      const start = { type: "start", sample_rate: RATE, format: "f32le", nbest: 5 };
      this.socket.send(JSON.stringify(token ? { ...start, token } : start));
    };
    this.socket.onmessage = ({ data }) => this.#take(data);
    this.socket.onclose = ({ code, reason }) => this.#close(code, reason);
  }

  get seconds() { // of audio that was given
    return this.sent / RATE;
  }

  get isFull() { // a file's sender waits then
    return !this.isReady || this.#buffered > HELD;
  }

  get #buffered() { // bytes
    return this.socket ? this.socket.bufferedAmount : 0;
  }

  /** Sends a packet (Float32Array); packets from before the server's first answer wait for it. */
  send(samples) {
    if (this.isEnded || this.isClosed) return;
    this.sent += samples.length;
    if (!this.isReady) {
      this.waiting.push(samples);
    } else if (this.socket.readyState === WebSocket.OPEN) {
      this.socket.send(samples);
    }
    const held = this.waiting.reduce((sum, packet) => sum + packet.length, this.#buffered / 4);
    if (held > LATE * RATE) this.cancel("The connection is too slow for live audio.");
  }

  /** Says that no audio follows; the last results come then. */
  end() {
    this.isEnded = true;
    if (this.isReady && this.socket.readyState === WebSocket.OPEN) this.#text({ type: "end" });
  }

  /** Ends without waiting for results. */
  cancel(error = null) {
    if (this.isClosed) return;
    this.#finish(error, 0);
    if (this.socket) this.socket.close();
  }

  #text(message) {
    this.socket.send(JSON.stringify(message));
  }

  #take(data) {
    if (this.isClosed) return;
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      return this.cancel("The server sent what this page does not understand.");
    }
    const { type } = message;
    if (type === "ready") {
      this.isReady = true;
      this.on.ready(message);
      for (const packet of this.waiting.splice(0)) this.socket.send(packet);
      if (this.isEnded) this.end();
    } else if (type === "partial" || type === "segment" || type === "warning") {
      this.on[type](message);
    } else if (type === "error") {
      this.error = message;
      setTimeout(() => this.socket.close(), 1000); // if the server does not
    } else if (type === "final") {
      this.isFinal = true;
    }
  }

  #close(code, reason) {
    if (this.isFinal) return this.#finish(null, code);
    const { code: name, message } = this.error || {};
    if (name === "token") code = 4401;
    const unknown = this.isOpen ? LOST : UNREACHED;
    this.#finish(message || reason || CLOSES[code] || unknown, code);
  }

  #finish(error, code) {
    if (this.isClosed) return;
    this.isClosed = true;
    this.on.closed(error, code);
  }
}
