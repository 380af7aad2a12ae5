// Any sampling rate to another while samples arrive: a polyphase filter, a sinc in a Kaiser window.
// Knows: samples. Must not know: where they come from. Runs in the page and in the audio worklet.

const ZEROS = 16; // zero crossings of the sinc on each side
const ROLL_OFF = 0.94; // of the lower rate's Nyquist frequency
const BETA = 9; // of the Kaiser window: about 90 dB

function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}

function bessel(x) { // the modified one of order 0
  let term = 1, sum = 1;
  for (let k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

/** Resamples one channel; what it returns does not depend on how the samples are cut into blocks. */
export class Resampler {
  constructor(from, to) {
    from = Math.round(from);
    to = Math.round(to);
    const common = gcd(from, to);
    this.up = to / common; // output n lies at input sample n * down / up
    this.down = from / common;
    this.half = this.up === this.down ? 0 : Math.ceil(ZEROS * Math.max(1, from / to));
    this.cutoff = ROLL_OFF * Math.min(1, to / from); // of the input's Nyquist frequency
    this.phases = new Map();
    this.held = new Float32Array(this.half); // inputs that are still needed; zeros before the first
    this.base = this.half; // where the next output lies in them
    this.phase = 0;
    this.read = this.written = 0;
  }

  /** Returns the outputs that the samples (Float32Array) complete. */
  push(samples) {
    this.read += samples.length;
    const all = new Float32Array(this.held.length + samples.length);
    all.set(this.held);
    all.set(samples, this.held.length);
    const out = [];
    while (this.base + this.half < all.length) {
      out.push(this.half ? this.#at(all) : all[this.base]);
      this.phase += this.down;
      this.base += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    const first = Math.min(all.length, Math.max(0, this.base - this.half));
    this.held = all.slice(first);
    this.base -= first;
    this.written += out.length;
    return Float32Array.from(out);
  }

  /** Returns the rest, as if silence followed; as many outputs in all as the inputs last. */
  end() {
    const wanted = Math.ceil((this.read * this.up) / this.down) - this.written;
    return this.push(new Float32Array(2 * this.half + 1)).slice(0, Math.max(0, wanted));
  }

  #at(all) {
    const taps = this.#taps(this.phase), first = this.base - this.half;
    let sum = 0;
    for (let k = 0; k < taps.length; k++) sum += taps[k] * all[first + k];
    return sum;
  }

  #taps(phase) { // made when a phase is met first
    let taps = this.phases.get(phase);
    if (!taps) {
      taps = Float64Array.from({ length: 2 * this.half + 1 }, (_, k) => {
        const t = k - this.half - phase / this.up, edge = 1 - (t / (this.half + 1)) ** 2;
        const x = Math.PI * this.cutoff * t;
        return (x ? Math.sin(x) / x : 1) * bessel(BETA * Math.sqrt(Math.max(0, edge)));
      });
      const sum = taps.reduce((a, b) => a + b);
      taps = taps.map((tap) => tap / sum);
      this.phases.set(phase, taps);
    }
    return taps;
  }
}
