"""vllm-router, told where to ask whether a key is right: its command line has no option for that.

    python -m taq_vllm.fleet.router URL|none ARGUMENTS_OF_VLLM_ROUTER

With a URL, every request to the router, whatever its path, has to bring a key for which a GET of that URL is answered
with 200; and the router brings the key in VLLM_API_KEY to the servers, also for paths for which it passes none on.
"""

import ctypes
import os
import signal
import sys

from taq_vllm.fleet.spec import KEY_VARIABLE

NO_CHECK = "none"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main(check: str, arguments: list[str]) -> None:
    """Become the router, which ends with the process that started it: others could answer for keys in its place."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from vllm_router.launch_router import launch_router, parse_router_args

    settings = parse_router_args(arguments)
    if check != NO_CHECK:
        settings.api_key_validation_urls = [check]
        settings.api_key = os.environ[KEY_VARIABLE]
    launch_router(settings)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
