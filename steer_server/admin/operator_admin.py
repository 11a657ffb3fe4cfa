"""What ``--operator-admin`` adds to a server, in one object."""

from __future__ import annotations

from contextlib import suppress

from operators.core.store import Store
from steer_server.admin.keeper import Keeper
from steer_server.admin.uploads import Uploads
from steer_server.config import ServerConfig
from steer_server.registry import Registry


class OperatorAdmin:
    """Made once, before the server starts: what an earlier one left unfinished is removed."""

    def __init__(self, config: ServerConfig, store: Store, registry: Registry) -> None:
        self.keeper = Keeper(store, registry)
        self.uploads = Uploads(
            self.keeper,
            max_file=config.max_artifact_bytes,
            max_uploads=config.max_uploads,
            max_bytes=config.max_upload_bytes,
            keep_seconds=config.upload_age,
        )
        # A store that is not there yet has nothing to remove, and one that cannot be read says so when it is.
        with suppress(OSError):
            store.remove_abandoned()

    async def close(self) -> None:
        """Ends what is under way, with nothing of it left in the store."""
        self.uploads.close()
