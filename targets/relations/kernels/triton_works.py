"""Whether Triton's kernels run on this machine, tested once."""

import os
import warnings
from functools import cache
from importlib.util import find_spec


@cache
def triton_works() -> bool:
    """Whether Triton is installed and can launch. Warns where it is installed and cannot; torch replaces it then.

    Triton compiles a part of itself on first use. That needs a C compiler and Python's headers, which containers often
    lack.
    """
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # compiler, linker and driver raise any kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"Triton does not work here, slower operations are used: {reason[0][:200]}", stacklevel=2)
        return False
    return True
