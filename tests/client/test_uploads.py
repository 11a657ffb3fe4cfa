"""An upload that the server refuses while it is written to: its own word is heard, not the transport's."""

import grpc
import pytest
from steer_client import AsyncSteerClient, SteerError, UnauthenticatedError
from steer_client._translate import translate_error


class Ended(grpc.RpcError):
    """As grpc.aio raises it where a write fails because the call has ended, and its status is not there yet."""

    def code(self):
        return grpc.StatusCode.INTERNAL

    def details(self):
        return "Internal error from Core"

    def trailing_metadata(self):
        return ()


async def test_a_refusal_amid_a_write_is_asked_for_again(tmp_path, monkeypatch):
    (file := tmp_path / "golden.safetensors").write_bytes(b"x")
    ended = translate_error(Ended(), target="here")
    answers = {"GetUpload": [0, UnauthenticatedError("no")], "UploadOperator": [ended]}

    async def answer(call, _timeout):
        given = answers[call.method].pop(0)
        if isinstance(given, SteerError):
            raise given
        return given

    async with AsyncSteerClient("127.0.0.1:1") as client:
        monkeypatch.setattr(client, "_answer", answer)
        with pytest.raises(UnauthenticatedError):
            await client.upload_operator(file)
        answers |= {"GetUpload": [0, 0, 0], "UploadOperator": [ended, ended, ended]}
        with pytest.raises(SteerError, match="Internal error from Core"):
            await client.upload_operator(file)
