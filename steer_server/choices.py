"""What the settings that nobody gave come to on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steer_server.config import ServerConfig
from steer_server.errors import StartupError

if TYPE_CHECKING:
    from operators.core.header import DTypeName
    from operators.core.store import Store


def device_of(config: ServerConfig) -> str:
    """The device, CUDA where there is one."""
    if config.device is not None:
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(config: ServerConfig, device: str) -> DTypeName:
    """The dtype on this device."""
    return config.dtype or ("float32" if device == "cpu" else "bfloat16")


def store_of(config: ServerConfig) -> Store:
    """The store. Raises :class:`StartupError` where one that was named is no directory."""
    from operators.core.store import Store

    if config.store is None:
        # The default one is made by the first operator that is saved; another one is more likely mistyped.
        return Store.default()
    if not config.store.is_dir():
        found = "is not a directory" if config.store.exists() else "does not exist"
        raise StartupError(f"store {config.store} {found} (--store, or STEER_STORE, names another; mkdir makes it)")
    return Store(config.store)
