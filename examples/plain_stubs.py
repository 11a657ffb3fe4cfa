"""The contract alone, without the SDK: what any gRPC client in any language does.

Receipts are not checked here; the SDK refuses a text that lacks them.
"""

import os

import grpc
from steering.v1 import comparison_pb2, generation_pb2_grpc, steering_pb2, text_pb2

with grpc.insecure_channel(os.environ.get("STEER_TARGET", "127.0.0.1:50051")) as channel:
    service = generation_pb2_grpc.GenerationServiceStub(channel)
    ocean = steering_pb2.OperatorUse(name="ocean", strength=0.4)
    request = comparison_pb2.CompareRequest(
        prompt=text_pb2.Prompt(text="The view from the window was"),
        sampling=text_pb2.SamplingParams(max_tokens=24, repetition_penalty=1.2),
        arms=[comparison_pb2.Arm(name="ocean", operators=[ocean])],
    )
    for event in service.Compare(request, timeout=120):
        if event.WhichOneof("event") == "finished":
            print(f"{event.arm}: {event.finished.text}")
            for receipt in event.finished.receipts:
                print(f"  {receipt.operator} {receipt.digest}: λ {2 * receipt.mean_dose:.3f}")
