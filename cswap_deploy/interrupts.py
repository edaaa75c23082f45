"""SIGINT and SIGTERM end a command within about a second, whatever it is doing then.

The handler raises KeyboardInterrupt in the main thread, so that files are closed and connections ended. That alone does not do:
native code holds it back, and libraries swallow it (torch's tracer did, in the middle of a stage). So a thread, woken by the
interpreter's own handler, ends the process after `GRACE_S` all the same, and no stage commits a result once a signal has come.
Where an exception would abort the process (an extension module that makes Python objects while it is imported, as onnx's does), none is
raised, and the thread does it alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from types import FrameType

EXIT_CODE = 130
GRACE_S = 0.6
"""For the main thread to end in its own way."""
SAYING_S = 0.2
"""For a last message, whose reader may not read."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_asked = threading.Event()


def arm(say: Callable[[], object]) -> None:
    """From now on these signals end this process, unless its caller had them ignored; `say` is called before it ends without the
    main thread's help."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of what a script runs in the background
            signal.signal(number, _interrupt)
    threading.Thread(target=_watch, args=(reading, say), daemon=True).start()


def disarm() -> None:
    """The command has ended, and how it ended is settled: a signal while libraries shut down changes nothing about it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def asked() -> bool:
    """Whether a signal has asked this process to end."""
    return _asked.is_set()


def require_none() -> None:
    """Raise KeyboardInterrupt again where one may have been swallowed."""
    if asked():
        raise KeyboardInterrupt


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    _asked.set()
    while frame:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _watch(reading: int, say: Callable[[], object]) -> None:
    while os.read(reading, 1)[0] not in SIGNALS:
        pass
    _asked.set()
    time.sleep(GRACE_S)
    timer = threading.Timer(SAYING_S, os._exit, [EXIT_CODE])
    timer.daemon = True
    timer.start()
    say()
    os._exit(EXIT_CODE)
