// The transcript: committed words, words that may change, words that the language model changed.
// Knows: the messages partial and segment, elements. Must not know: sockets, audio.
// All text goes in as text, never as HTML.

const SPOKEN = 20; // lines kept for screen readers

/** Makes an element with properties and children (elements or text). */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Scripts that have no spaces between words (text/scripts.py). */
const UNSPACED = "[\\p{sc=Han}\\p{sc=Hira}\\p{sc=Kana}\\p{sc=Thai}\\p{sc=Lao}\\p{sc=Khmr}\\p{sc=Mymr}]";
const AFTER = new RegExp(`(${UNSPACED}) +`, "gu");
const BEFORE = new RegExp(` +(?=${UNSPACED})`, "gu");
const textOf = (words) => words.map((word) => word.text).join(" ").replace(AFTER, "$1").replace(BEFORE, "");

/** Shows what is recognized in `root`; screen readers hear each committed word once, from `announcer`. */
export class Transcript {
  constructor(root, announcer) {
    this.root = root;
    this.announcer = announcer;
    this.tips = 0;
    this.open = null; // the segment that still grows
    root.addEventListener("pointerover", (event) => this.#show(event.target.closest(".word")));
    root.addEventListener("pointerleave", () => this.#show(null));
    root.addEventListener("focusin", (event) => this.#show(event.target.closest(".word")));
    root.addEventListener("focusout", () => this.#show(null));
    root.addEventListener("click", (event) => this.#show(event.target.closest(".word")));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#show(null);
    });
  }

  clear() {
    this.root.replaceChildren();
    this.announcer.replaceChildren();
    this.open = null;
  }

  /** A stream ends, perhaps without its last segment: what stands there stays. */
  end() {
    if (this.open && !this.open.clock.textContent) this.open.element.remove();
    this.open = null;
  }

  partial({ segment, committed, unstable }) {
    this.#follow(() => {
      const open = this.#segment(segment);
      const fresh = committed.slice(open.count);
      if (!open.clock.textContent && (committed.length || unstable.length)) {
        open.clock.textContent = clock((committed[0] || unstable[0]).start);
      }
      if (fresh.length) {
        open.committed.append(`${textOf(fresh)} `);
        open.count = committed.length;
        this.#say(textOf(fresh));
      }
      open.unstable.textContent = textOf(unstable);
    });
  }

  segment({ segment, words, nbest }) {
    this.#follow(() => {
      const open = this.#segment(segment);
      this.open = null;
      const rest = words.slice(open.count);
      if (rest.length) this.#say(textOf(rest));
      if (!words.length) return open.element.remove();
      open.clock.textContent = clock(words[0].start);
      open.paragraph.replaceChildren(open.clock, " ");
      for (const word of words) open.paragraph.append(this.#word(word), " ");
      if (nbest && nbest.length > 1) open.element.append(hypotheses(nbest));
    });
  }

  #segment(number) {
    if (this.open && this.open.number !== number) this.end();
    if (!this.open) {
      const committed = make("span", { className: "committed" });
      const unstable = make("span", { className: "unstable" });
      const time = make("span", { className: "clock" });
      const paragraph = make("p", {}, time, " ", committed, unstable);
      const element = make("div", { className: "segment" }, paragraph);
      this.root.append(element);
      this.open = { number, element, paragraph, clock: time, committed, unstable, count: 0 };
    }
    return this.open;
  }

  #word({ text, changed, without_llm: without, alternatives = [] }) {
    if (!changed) return text;
    const id = `tip-${this.tips++}`;
    const lines = [`Without the language model: ${without || "no word"}`];
    const others = alternatives.filter((word) => word !== text && word !== without);
    if (others.length) lines.push(`Alternatives: ${others.join(", ")}`);
    const tip = make("span", { className: "tip", id }, ...lines.map((line) => make("span", {}, line)));
    tip.setAttribute("role", "tooltip");
    const button = make("button", { type: "button", className: "changed" }, text);
    button.setAttribute("aria-describedby", id);
    return make("span", { className: "word" }, button, tip);
  }

  #show(word) { // the alternatives of this word alone, inside the window
    for (const shown of this.root.querySelectorAll(".word.open")) {
      if (shown !== word) shown.classList.remove("open");
    }
    if (!word || word.classList.contains("open")) return;
    word.classList.add("open");
    const tip = word.lastElementChild;
    tip.style.setProperty("--shift", "0px");
    const { right } = tip.getBoundingClientRect(), most = document.documentElement.clientWidth - 8;
    if (right > most) tip.style.setProperty("--shift", `${most - right}px`);
  }

  #say(text) {
    this.announcer.append(make("p", {}, text));
    while (this.announcer.childElementCount > SPOKEN) this.announcer.firstElementChild.remove();
  }

  #follow(change) { // who reads at the end of the page stays there
    const page = document.documentElement;
    const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
    change();
    if (atEnd) page.scrollTop = page.scrollHeight;
  }
}

function hypotheses(nbest) {
  const rows = nbest.map(({ text, score }) => make("li", {}, `${text || "(nothing)"} (${score.toFixed(2)})`));
  const summary = make("summary", {}, `${nbest.length} hypotheses`);
  return make("details", {}, summary, make("ol", {}, ...rows));
}
