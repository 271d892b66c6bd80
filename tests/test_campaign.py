"""A short campaign, so that the script stays fit for a long one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

from support import until

CAMPAIGN = Path(__file__).with_name("campaign.py")
SHORT = ["--seconds", "2", "--owners", "5", "--processes", "2", "--tasks", "2"]
SHORT += ["--seed", "7", "--mode", "strict", "--no-clocks"]


async def test_short_campaign_loses_nothing_and_leaves_no_process() -> None:
    """Replicas die, the store and the provider fail, and every owner is served."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(CAMPAIGN), "sqlite", *SHORT),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )

    async def empty() -> bool:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            return False
        return True

    try:
        told, _ = await asyncio.wait_for(process.communicate(), 50)
        figures = told.decode()
        assert process.returncode == 0, figures
        assert "all is well" in figures
        for counted in ("replicas killed", "API calls served", "owners who consented"):
            found = re.search(rf"{counted}.* (\d+)\n", figures)
            assert found, figures
            assert int(found[1]), counted
        await until(empty)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
