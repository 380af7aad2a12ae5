// The audio worklet of the microphone: one channel at 16 kHz in packets of a tenth of a second.
// Knows: samples of the browser's audio thread. Must not know: the page, the server.
import { Resampler } from "./resample.js";

const RATE = 16000;
const PACKET = RATE / 10;
const BLOCK = 1024; // samples of the device that are resampled at once

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.block = new Float32Array(BLOCK);
    this.packet = new Float32Array(PACKET);
    this.inBlock = this.inPacket = 0;
    this.live = true;
    this.port.onmessage = () => this.end();
  }

  process([channels]) {
    if (this.live && channels.length) {
      for (let i = 0; i < channels[0].length; i++) {
        let sum = 0;
        for (const channel of channels) sum += channel[i];
        this.block[this.inBlock++] = sum / channels.length;
        if (this.inBlock === BLOCK) {
          this.put(this.resampler.push(this.block));
          this.inBlock = 0;
        }
      }
    }
    return this.live;
  }

  put(samples) {
    for (const sample of samples) {
      this.packet[this.inPacket++] = sample;
      if (this.inPacket === PACKET) this.post();
    }
  }

  post() {
    this.port.postMessage(this.packet.slice(0, this.inPacket));
    this.inPacket = 0;
  }

  end() { // what is left, then null
    if (!this.live) return;
    this.live = false;
    this.put(this.resampler.push(this.block.subarray(0, this.inBlock)));
    this.put(this.resampler.end());
    if (this.inPacket) this.post();
    this.port.postMessage(null);
  }
}

registerProcessor("capture", Capture);
