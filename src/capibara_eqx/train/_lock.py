import errno
import os
import platform
import sys
from pathlib import Path
from typing import IO


# Some network file systems know no locks: there nothing is refused.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def hold_lock(path: Path) -> IO[str] | None:
    """Take the lock file `path` until the file returned is closed.

    The system lets go of it when the process ends, however it ends, so the file itself
    stays and means nothing. `None` where there are no such locks.

    **Raises:**

    `BlockingIOError`, its text who holds the lock.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise BlockingIOError(holder) from error
    except OSError as error:
        file.close()
        if error.errno in _NO_LOCKS:
            return None
        raise
    return file
