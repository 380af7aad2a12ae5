"""The web page in real browsers against a real server of tiny models: files, microphones, access.
Knows: the page's elements, tiny models, browsers. Must not know: how streams are decoded.
"""
from __future__ import annotations

import base64

import browsers
import numpy as np
import pytest
from page_tools import START, address, done, error, messages, opened, segments, send_file, sent, until
from scipy.signal import firwin
from serve_tools import running


@pytest.fixture(scope="module")
def server(made):
    with running(made) as server:
        yield server


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_is_sent_whole_and_its_segments_are_shown(browser, server, talk) -> None:
    path, samples = talk
    with opened(browser, address(server)) as page:
        send_file(page, path)
        until(page, lambda: done(page))
        assert error(page) == "" and page.inner_text("#status") == "Done: 0:02 of audio."
        assert np.abs(sent(page) - samples).max() < 1e-4
        assert page.evaluate("seen.texts") == [
            {"type": "start", "sample_rate": 16000, "format": "f32le", "nbest": 5}, {"type": "end"}]
        found = messages(page, "segment")
        assert len(found) >= 3 and segments(page) == [m["text"] for m in found if m["words"]]
        heard = " ".join(page.locator("#announcer p").all_text_contents())
        assert heard.split() == " ".join(m["text"] for m in found).split()  # each word once
        listed = page.locator(".segment").first.locator("li").all_text_contents()
        assert listed == [f"{n['text']} ({n['score']:.2f})" for n in found[0]["nbest"]]


def test_words_that_the_language_model_changed_are_marked(browser, server, talk) -> None:
    with opened(browser, address(server), viewport={"width": 360, "height": 640}) as page:
        send_file(page, talk[0])
        until(page, lambda: done(page))
        words = [word for message in messages(page, "segment") for word in message["words"]]
        changed = [word for word in words if word.get("changed")]
        marked = page.locator("button.changed")
        assert len(changed) > 0
        assert marked.all_text_contents() == [word["text"] for word in changed]
        page.focus("#clear")
        for number, word in enumerate(changed[:5]):
            while not marked.nth(number).evaluate("(button) => button === document.activeElement"):
                page.keyboard.press("Tab")
            [tip] = [tip for tip in page.locator(".tip").all() if tip.is_visible()]
            assert tip.get_attribute("id") == marked.nth(number).get_attribute("aria-describedby")
            assert f"Without the language model: {word['without_llm'] or 'no word'}" in tip.inner_text()
            for other in set(word["alternatives"]) - {word["without_llm"]}:
                assert other in tip.inner_text()
            box = tip.bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= 360
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.keyboard.press("Escape")
        assert page.locator(".tip:visible").count() == 0
        marked.first.hover()
        assert page.locator(".tip:visible").count() == 1
        page.locator(".tip:visible").hover()  # it stays while the pointer is on it
        assert page.locator(".tip:visible").count() == 1


def test_a_file_in_its_own_time_shows_words_while_it_runs(chromium, server, talk) -> None:
    with opened(chromium, address(server)) as page:
        send_file(page, talk[0], fast=False)
        until(page, lambda: len(segments(page)) > 0)
        assert not done(page) and page.inner_text("#microphone") == "Stop"
        assert len(sent(page)) < len(talk[1])
        until(page, lambda: done(page))
        assert len(sent(page)) == len(talk[1])
        assert page.inner_text("#lag").startswith("0.") and "9 of 10 below" in page.inner_text("#lag")


def test_a_file_can_be_dropped(chromium, server, talk) -> None:
    data = base64.b64encode(talk[0].read_bytes()).decode()
    make = """([data, names]) => {
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      const carried = new DataTransfer();
      for (const name of names) carried.items.add(new File([bytes], name, { type: "audio/wav" }));
      return carried;
    }"""
    with opened(chromium, address(server)) as page:
        page.check("#fast")
        two = page.evaluate_handle(make, [data, ["one.wav", "two.wav"]])
        page.dispatch_event("#transcript", "dragenter", {"dataTransfer": two})
        assert page.get_attribute("body", "class") == "over"
        page.dispatch_event("#transcript", "drop", {"dataTransfer": two})
        assert error(page) == "Open one file at a time." and page.get_attribute("body", "class") == ""
        one = page.evaluate_handle(make, [data, ["one.wav"]])
        page.dispatch_event("#transcript", "drop", {"dataTransfer": one})
        until(page, lambda: done(page))
        assert error(page) == "" and len(segments(page)) > 0
        page.click("#clear")
        assert segments(page) == []


def test_what_is_no_audio_is_refused(browser, server, tmp_path) -> None:
    (tmp_path / "notes.wav").write_text("no sound in here")
    with opened(browser, address(server)) as page:
        send_file(page, tmp_path / "notes.wav")
        until(page, lambda: error(page) != "")
        assert error(page) == "notes.wav: the browser cannot decode this file as audio."
        assert page.evaluate("seen.texts") == [] and done(page)


# --- the microphone ---------------------------------------------------------------------------------------


def test_the_microphone_is_heard_as_it_is(driver, server, talk) -> None:
    with browsers.chromium(driver, talk[0]) as browser, opened(browser, address(server)) as page:
        page.click(START)
        until(page, lambda: len(sent(page)) >= 48_000)
        assert page.inner_text("#status") == "Listening (llm-delayed-shortest)."
        assert len(messages(page, "partial")) > 0 and not done(page)
        page.click(START)
        until(page, lambda: done(page))
        assert error(page) == "" and segments(page) == [
            m["text"] for m in messages(page, "segment") if m["words"]]
        low = firwin(301, 2_000, fs=16_000)  # where a delay of half a sample does little
        got, played = (np.convolve(samples, low, "same") for samples in (sent(page), talk[1]))
        played = played[8_000:24_000]
        likeness = np.correlate(got, played) / np.linalg.norm(played)
        best = int(likeness.argmax())
        assert likeness[best] > 0.95 * np.linalg.norm(got[best : best + len(played)])  # louder, else the same


def test_firefox_hears_its_microphone(firefox, server) -> None:
    if not browsers.has_sound_server():
        pytest.skip("no PulseAudio here: Firefox's audio does not start (bash tools/setup_browser.sh)")
    with opened(firefox, address(server)) as page:
        page.click(START)
        until(page, lambda: len(sent(page)) >= 24_000)
        page.click(START)
        until(page, lambda: done(page))
        assert error(page) == "" and len(messages(page, "final")) == 1
        loud = np.abs(np.fft.rfft(sent(page)[8_000:24_000])) ** 2  # 1 Hz a bin
        peak = int(loud.argmax())
        assert 300 < peak < 2000 and loud[peak - 20 : peak + 20].sum() > 0.9 * loud.sum()  # a pure tone


def test_a_microphone_that_is_not_allowed(chromium, server) -> None:
    with opened(chromium, address(server)) as page:
        page.click(START)
        until(page, lambda: error(page) != "")
        assert error(page).startswith("The browser may not use the microphone. Allow it")
        assert page.evaluate("seen.texts") == [] and done(page)
        assert server.engine.streams == 0


# --- safety and access ------------------------------------------------------------------------------------


def test_text_is_never_html(browser, server) -> None:
    script = """async () => {
      const { Transcript } = await import("/transcript.js");
      const bad = "<img src=x onerror=window.hurt=1><b>bold</b>";
      const root = document.getElementById("transcript");
      const transcript = new Transcript(root, document.getElementById("announcer"));
      const notes = { changed: true, without_llm: bad + "1", alternatives: [bad + "2"] };
      const word = { text: bad, start: 0, end: 1, ...notes };
      transcript.partial({ segment: 0, committed: [word], unstable: [word] });
      const partial = document.body.textContent.split(bad).length - 1;
      const nbest = [{ text: bad, score: -1 }, { text: bad, score: -2 }];
      transcript.segment({ segment: 0, text: bad, words: [word], nbest });
      return [partial, root.textContent.split(bad).length - 1, document.querySelectorAll("img, b").length];
    }"""
    with opened(browser, address(server)) as page:
        assert page.evaluate(script) == [3, 5, 0]
        assert page.evaluate("window.hurt") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(chromium, server, scheme) -> None:
    script = """() => {
      const style = getComputedStyle(document.documentElement);
      const luminance = (name) => {
        const hex = style.getPropertyValue(name).trim();
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
          .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const pairs = [["--text", "--ground"], ["--soft", "--ground"], ["--text", "--mark"],
        ["--text", "--raised"], ["--soft", "--raised"], ["--on-accent", "--accent"],
        ["--bad", "--bad-ground"]];
      return pairs.map((pair) => {
        const [low, high] = pair.map(luminance).sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
      });
    }"""
    with opened(chromium, address(server), color_scheme=scheme) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert min(page.evaluate(script)) >= 4.5


def test_all_that_can_be_used_has_a_name(chromium, server) -> None:
    with opened(chromium, address(server)) as page:
        page.evaluate("document.getElementById('access').hidden = false")
        for role, name in (("button", "Start microphone"), ("button", "Open a file"),
                           ("button", "Clear text"), ("checkbox", "file as fast as possible"),
                           ("meter", "Behind the speech, in seconds"),
                           ("textbox", "The server asks for a token"), ("log", None)):
            assert page.get_by_role(role, **({"name": name} if name else {})).count() == 1, (role, name)
        assert page.get_attribute("#announcer", "aria-live") == "polite"
        assert page.evaluate("document.documentElement.lang") == "en"
