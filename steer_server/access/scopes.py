"""The scope that each RPC needs, by its full name: what is not in this table is refused to everybody."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

Scope = Literal["generate", "read", "admin"]
SCOPES: Final[tuple[Scope, ...]] = ("generate", "read", "admin")
"""No scope has another one in it."""

GENERATE: Final = "generate"
READ: Final = "read"
ADMIN: Final = "admin"
OPEN: Final = "open"
"""Of calls that need no token: who asks whether the server is well learns nothing else."""

RPC_SCOPES: Mapping[str, str] = MappingProxyType(
    {
        "/steering.v1.GenerationService/Generate": GENERATE,
        "/steering.v1.GenerationService/GenerateStream": GENERATE,
        "/steering.v1.GenerationService/Compare": GENERATE,
        "/steering.v1.GenerationService/Score": GENERATE,
        "/steering.v1.GenerationService/Tokenize": READ,
        "/steering.v1.GenerationService/GetModelInfo": READ,
        "/steering.v1.OperatorService/ListOperators": READ,
        "/steering.v1.OperatorService/GetOperator": READ,
        "/steering.v1.OperatorService/ReloadOperators": ADMIN,
        "/steering.v1.OperatorAdminService/UploadOperator": ADMIN,
        "/steering.v1.OperatorAdminService/GetUpload": ADMIN,
        "/steering.v1.OperatorAdminService/LoadOperator": ADMIN,
        "/steering.v1.OperatorAdminService/UnloadOperator": ADMIN,
        "/steering.v1.OperatorAdminService/DeleteOperator": ADMIN,
        "/steering.v1.OperatorAdminService/BuildOperator": ADMIN,
        "/steering.v1.OperatorAdminService/WatchBuild": ADMIN,
        "/steering.v1.OperatorAdminService/CancelBuild": ADMIN,
        "/steering.v1.OperatorAdminService/ListBuilds": ADMIN,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": READ,
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/List": OPEN,
        "/grpc.health.v1.Health/Watch": OPEN,
    }
)
"""By "/service/method"."""
