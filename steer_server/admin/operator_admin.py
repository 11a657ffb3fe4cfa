"""What ``--operator-admin`` adds to a server, in one object."""

from __future__ import annotations

from contextlib import suppress

from operators.core.store import Store
from steer_server.admin.build_process import BuildLimits
from steer_server.admin.builds import Builds
from steer_server.admin.keeper import Keeper
from steer_server.admin.threads import FileThreads
from steer_server.admin.uploads import Uploads
from steer_server.admin.work_directory import remove_abandoned
from steer_server.config import ServerConfig
from steer_server.registry import Registry
from steer_server.types import ModelInfo


class OperatorAdmin:
    """Made once, before the server starts: what an earlier one left unfinished is removed."""

    def __init__(self, config: ServerConfig, store: Store, registry: Registry, model: ModelInfo) -> None:
        self.threads = FileThreads()
        self.keeper = Keeper(store, registry, max_served=config.max_served_bytes)
        self.uploads = Uploads(
            self.keeper,
            self.threads,
            max_file=config.max_artifact_bytes,
            max_uploads=config.max_uploads,
            max_bytes=config.max_upload_bytes,
            keep_seconds=config.upload_age,
        )
        limits = BuildLimits(
            memory=config.build_memory,
            seconds=config.build_time,
            threads=config.build_threads,
            model=config.model,
            attention=config.attention,
        )
        self.builds = Builds(
            self.keeper, self.threads, model, limits, at_once=config.max_builds, max_waiting=config.max_waiting_builds
        )
        # A store that is not there yet has nothing to remove, and one that cannot be read says so when it is.
        with suppress(OSError):
            store.remove_abandoned()
            remove_abandoned(store.path)

    async def close(self) -> None:
        """Ends what is under way, with nothing of it left in the store."""
        await self.uploads.close()
        await self.builds.close()
        self.threads.close()
