"""`surgery.Stateful`: surgery's own state in a `torch.distributed.checkpoint`, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from surgery.checkpoints import encoding
from surgery.checkpoints.contents import about_of, state_of
from surgery.checkpoints.fits import check
from surgery.checkpoints.run import restore
from surgery.engine.finding import applied
from surgery.errors import CheckpointError
from surgery.weights import shards

WHAT = "the distributed checkpoint"


class Stateful:
    """What surgery has to save besides model and optimizer, as a `Stateful` of torch.

    Use it with torch.distributed.checkpoint, on any number of ranks, to save and to load:

        state = {"surgery": surgery.Stateful(model), "model": get_model_state_dict(model), ...}
        dcp.save(state, checkpoint_id=folder)

    Coordinates are saved as they are held, sharded by FSDP2 or whole; everything else is small.
    Loading raises CheckpointError if the state is of other passes, another partition, or another
    model. Raises ModelError if nothing was applied.
    """

    def __init__(self, model: nn.Module) -> None:
        applied(model)
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """Return the coordinates by name, and the rest as one piece of bytes."""
        surgery = applied(self.model)
        surgery.bind()
        state = state_of(surgery)
        coordinates = state.pop("coordinates")
        mapped = {c.name for c in surgery.decision.coordinates if c.mapped}
        # Which copies there are changes with the round, and a checkpoint is read by its keys.
        copies = {n: t.detach() for n, t in coordinates.items() if n not in mapped}
        state["copies"] = {n: shards.whole(t) for n, t in copies.items()}
        coordinates = {n: t for n, t in coordinates.items() if n in mapped}
        tensors: dict[str, Tensor] = {}
        values = json.dumps(
            {"about": about_of(surgery), "state": encoding.encode(state, "", tensors)}
        )
        return {"coordinates": coordinates, "rest": save(tensors, {"values": values})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        surgery = applied(self.model)
        if surgery.clock.stepped:
            raise CheckpointError(
                "some of the optimizers of this model have made their step, and others have not. "
                "Load between steps."
            )
        rest = state["rest"]
        size = int.from_bytes(rest[:8], "little")  # safetensors reads this header of files only
        values = json.loads(json.loads(rest[8 : 8 + size])["__metadata__"]["values"])
        check(surgery, values["about"], WHAT)
        found = encoding.decode(values["state"], load(rest))
        restore(surgery, found | {"coordinates": {**state["coordinates"], **found["copies"]}})
