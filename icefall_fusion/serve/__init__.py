"""A server of live transcription: WebSocket, two protocols, a page for a browser.
Knows: streams, recognizers, Starlette, uvicorn. Must not know: how a stream is decoded.

    job.py              the job ``serve``: options, start, stop
    app.py              paths: sockets, the page, health, metrics
    access.py           who may use it
    session.py          one socket: reading, writing, limits
    json_protocol.py    our protocol
    sherpa_protocol.py  that of sherpa-onnx
    talk.py             one client between the event loop and the decoding thread
    engine.py           the decoding thread
    samples.py          bytes to samples at 16 kHz
    changes.py          which words the language model has changed
    limits.py           what a client may ask
    metrics.py          counters
    web/                the page

The event loop reads and writes; the decoding thread computes. A round takes what has come of all streams.
"""
