"""What a call on PyTorch allocates beside its results, as XLA says it of a program."""

from collections.abc import Callable
from typing import Any


def temp_bytes(torch: Any, run: Callable[[], Any]) -> int:
    """The most that `run` has allocated at a time, less what it keeps at its end.

    **Arguments:**

    - `torch`: the module.
    - `run`: a call on the CPU that returns its results.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        # Held until the profile ends, or it would be seen to be freed.
        results = run()
    now = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del results
    return most - now
