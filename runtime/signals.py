"""Signals that ask a run to stop: noted while a step is taken, acted on once all is saved. And the exit codes."""

import os
import signal
import time
from contextlib import suppress

EXIT_STOPPED = 85  # a signal ended the run, which had saved its last step: start it again to resume
EXIT_NOT_FINITE = 86  # several steps in a row had a loss or gradient that is not finite
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1 is Slurm's warning


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGINT from `with` on.

    After wait() the loop asks for `received` and stops after its step. Before it, and after act(), there is nothing to
    save, and a signal ends the program. A second signal ends it at once, or after a wait for another rank.
    """

    def __init__(self):
        self.received, self.at, self.waits = None, 0.0, False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """From here on a signal is only noted: the loop finishes its step and saves."""
        self.waits = True

    def act(self) -> None:
        """From here on a signal ends the program where it is, as one that came in between does now: all is saved."""
        self.waits = False
        if self.received:
            raise SystemExit(EXIT_STOPPED)

    def note(self, number: int, frame) -> None:
        if self.received:
            if time.monotonic() - self.at < 0.1:  # `timeout` signals the process, then its group
                return
            os._exit(128 + number)
        self.received, self.at = signal.Signals(number).name, time.monotonic()
        what = "finishing this step, then saving" if self.waits else "nothing to save; start again to resume"
        with suppress(OSError):  # Ctrl-C has ended `tee` too; print may be what the signal has interrupted
            os.write(2, f"\n{self.received}: {what}\n".encode())
        if not self.waits:
            raise SystemExit(EXIT_STOPPED)
