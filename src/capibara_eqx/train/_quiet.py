import logging
import sys
import warnings
from types import TracebackType


class LateErrors:
    """Keeps quiet what the threads of a failed save go on to report.

    The first array that cannot be written ends the save with an error. Those that are
    written beside it then fail one by one, and each prints a traceback of its own,
    some only when their future is collected; together they hide the message. So once
    a save has failed this stays in place; after a good one it is taken away.

    Only reports that name `folder`, or that of a callback that comes too late for its
    event loop, are dropped.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]

    def __enter__(self) -> "LateErrors":
        self._before = sys.unraisablehook
        self._own = self._unraisable
        sys.unraisablehook = self._own
        for logger in self._loggers:
            logger.addFilter(self._keeps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            # The writes that were not begun, when Python clears them away.
            warnings.filterwarnings(
                "ignore", "coroutine '.*serialize.* was never awaited", RuntimeWarning
            )
            return
        for logger in self._loggers:
            logger.removeFilter(self._keeps)
        if sys.unraisablehook is self._own:
            sys.unraisablehook = self._before

    def _unraisable(self, report: "sys.UnraisableHookArgs") -> None:
        if not self._is_late(report.exc_value):
            self._before(report)

    def _keeps(self, record: logging.LogRecord) -> bool:
        error = None if record.exc_info is None else record.exc_info[1]
        return not (self._folder in record.getMessage() or self._is_late(error))

    def _is_late(self, error: BaseException | None) -> bool:
        text = str(error)
        closed = isinstance(error, RuntimeError) and text == "Event loop is closed"
        return closed or self._folder in text
