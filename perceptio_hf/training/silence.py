"""What keeps trainers from the network, and from saying what is not so."""

import os
from typing import Any


class TellsNobody:
    """Before one of TRL's trainers among the bases: no telemetry unless the user asks for it, and no card.

    TRL tells its makers of every training. Here it does so only where the user has set the variable to 0 (or false, or
    no): a training asks nothing of the network by itself.
    """

    def _send_telemetry(self) -> None:
        if os.environ.get("HF_HUB_DISABLE_TELEMETRY", "").strip().lower() in ("0", "false", "no", "off"):
            super()._send_telemetry()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's would be that of a text model, made from "None" where the base is a folder. `perceptio push` writes a
        card of its own."""
