"""Client of a steering server: text generation steered by detached-Jacobian operators.

    from steer_client import OperatorUse, SteerClient

    with SteerClient() as client:
        result = client.compare("My favourite place is", operators=[OperatorUse("golden-gate")])
        print(result.normal.text)
        print(result.steered["steered"].generation.text)

Every call raises a SteerError when it fails. No request is silently unsteered: a text comes back only with
the receipts of the operators that were requested.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer_client._public import *  # noqa: F403
else:
    # gRPC and asyncio take most of the time that an import needs, and `steer --help` uses neither: they are imported
    # with the first public name.
    def __getattr__(name: str) -> object:
        # A private name is a submodule, which the import system finds itself.
        if name == "__all__" or not name.startswith("_"):
            public = import_module("steer_client._public")
            if hasattr(public, name):
                return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        private = {name for name in globals() if name.startswith("_")}
        return sorted({*private, *import_module("steer_client._public").__all__})
