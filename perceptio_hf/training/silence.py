"""What keeps trainers from the network."""

import os


class TellsNobody:
    """Before one of TRL's trainers among the bases: no telemetry unless the user asks for it.

    TRL tells its makers of every training. Here it does so only where the user has set the variable to 0 (or false, or
    no): a training asks nothing of the network by itself.
    """

    def _send_telemetry(self) -> None:
        if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "").strip().lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()
