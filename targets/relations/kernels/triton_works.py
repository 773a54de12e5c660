"""Whether Triton's kernels can be used here, asked once."""

import os
import warnings
from functools import cache
from importlib.util import find_spec


@cache
def triton_works() -> bool:
    """Whether Triton is installed and can launch; else torch's own operations take over, with a warning.

    Triton builds a part of itself on first use, for which it needs a C compiler and Python's headers: containers often
    have neither.
    """
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # of the compiler, the linker, the driver: of any kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"Triton does not work here, slower operations are used: {reason[0][:200]}", stacklevel=2)
        return False
    return True
