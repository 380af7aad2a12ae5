"""Live audio in packets: a file, raw PCM from a pipe, a microphone (the only importer of sounddevice).
Knows: files, pipes, devices. Must not know: streams, how anything is decoded.
"""
from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from typing import Any, BinaryIO, Iterator, Optional

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.data.audio import SAMPLE_RATE, Resampler, load_audio

PIPE = "-"  # standard input
MICROPHONE = "mic"  # mic:DEVICE is another than the system's own
PACKET = SAMPLE_RATE // 10  # samples
_WINDOW = 10.0  # seconds of a file read at once
_WAITING = 600  # packets of a microphone that wait to be decoded


def live_packets(name: str) -> Iterator[np.ndarray]:
    """Yield the samples of a source as they come, float32 at 16 kHz.

    Args:
        name: a file; "-": see `pcm_packets`; "mic" or "mic:DEVICE": see `microphone_packets`.

    Raises:
        ValueError: standard input is a terminal, or see the functions of the sources.
    """
    kind, _, device = name.partition(":")
    if kind == MICROPHONE:
        return microphone_packets(device or None)
    if name == PIPE:
        file = sys.stdin.buffer
        check(not file.isatty(), "standard input", "be a pipe or a file of raw PCM", "a terminal")
        return pcm_packets(file)
    return file_packets(name)


def file_packets(path: str) -> Iterator[np.ndarray]:
    """Yield the samples of a file in packets; little of it is in memory.

    Raises:
        AudioError: see `load_audio`.
    """
    begin = 0.0
    while True:
        samples = load_audio(path, allow_empty=begin > 0, offset=begin, duration=_WINDOW)
        for start in range(0, len(samples), PACKET):
            yield samples[start : start + PACKET]
        if len(samples) < round(_WINDOW * SAMPLE_RATE):
            return
        begin += _WINDOW


def pcm_packets(file: BinaryIO) -> Iterator[np.ndarray]:
    """Yield the samples of raw PCM (16 bits, little endian, one channel, 16 kHz) as they come.

    Half a sample at the end is left out with a warning.

    Raises:
        ValueError: there is not one sample, or it is a WAV file.
    """
    rest, read_any = b"", False
    while True:
        read = getattr(file, "read1", file.read)(2 * PACKET)
        if not read:
            break
        whole = rest + read
        if not read_any and len(whole) < 4:  # too short to tell what it is
            rest = whole
            continue
        rule = "be raw PCM (16 bits, 16 kHz, one channel; of a WAV file give the name)"
        check(read_any or whole[:4] != b"RIFF", "standard input", rule, "a WAV file")
        even = len(whole) // 2 * 2
        rest, read_any = whole[even:], True
        yield np.frombuffer(whole[:even], "<i2").astype(np.float32) / 32768
    if not read_any and len(rest) > 1:
        yield np.frombuffer(rest[:2], "<i2").astype(np.float32) / 32768
        rest, read_any = rest[2:], True
    check(read_any, "standard input", "have samples of 16 bits", f"{len(rest)} bytes")
    if rest:
        logging.warning("the last byte is half a sample: it is left out")


def microphone_packets(device: Optional[str] = None) -> Iterator[np.ndarray]:
    """Yield what a microphone hears, without end; a thread reads it, so that little is lost meanwhile.

    Args:
        device: a number of ``python -m sounddevice``, or a part of a name; None: the system's own.

    Raises:
        ModuleNotFoundError: sounddevice or PortAudio is missing.
        ValueError: there is no such microphone, or it cannot be read (any longer).
    """
    sounddevice = _sounddevice()
    stream, rate = _open(sounddevice, device)
    resampler = None if rate == SAMPLE_RATE else Resampler(rate)
    waiting: queue.Queue[Any] = queue.Queue(_WAITING)
    stopped = threading.Event()

    def read() -> None:
        while not stopped.is_set():
            try:
                samples, lost = stream.read(rate // 10)
                item: Any = samples[:, 0].copy(), lost
            except Exception as error:
                item = error
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    waiting.put(item, timeout=0.1)
                    break
            if isinstance(item, Exception):
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    warned = False
    try:
        while True:
            item = waiting.get()
            if isinstance(item, Exception):
                raise ValueError(f"the microphone cannot be read any longer: {item}") from item
            samples, lost = item
            if lost and not warned:
                warned = True
                logging.warning("the microphone was not read in time: some sound is lost")
            yield samples if resampler is None else resampler.accept(samples)
    finally:
        stopped.set()
        thread.join(5.0)
        stream.close()


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the microphone needs the package sounddevice: pip install sounddevice", name="sounddevice"
        ) from None
    except OSError as error:  # its library is not in the wheel for Linux
        remedy = "Debian: apt-get install libportaudio2"
        raise ModuleNotFoundError(
            f"the microphone needs PortAudio ({remedy}): {error}", name="sounddevice"
        ) from None
    return sounddevice


def _open(sounddevice: Any, device: Optional[str]) -> tuple[Any, int]:
    """Return a stream that runs and its rate: 16 kHz, or where the device has not that, its own."""
    number = int(device) if device is not None and device.isdecimal() else device
    try:
        found = sounddevice.query_devices(number, "input")
        rate = SAMPLE_RATE
        try:
            sounddevice.check_input_settings(number, channels=1, dtype="float32", samplerate=rate)
        except sounddevice.PortAudioError:
            rate = round(found["default_samplerate"])
        stream = sounddevice.InputStream(rate, device=number, channels=1, dtype="float32", latency="high")
        stream.start()
    except (ValueError, sounddevice.PortAudioError) as error:
        names = [f"{one['index']}: {one['name']}" for one in sounddevice.query_devices()
                 if one["max_input_channels"] > 0]
        there = "; ".join(names) or "none"
        raise ValueError(f"microphone {device or '(of the system)'} cannot be opened: {error} "
                         f"(microphones here: {there})") from None
    logging.info("listening to %s at %d Hz; Ctrl-C ends it", found["name"], rate)
    return stream, rate
